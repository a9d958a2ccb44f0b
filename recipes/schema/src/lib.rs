//! Typed recipes and the memory arithmetic.
