//! gqa
