//! mla
