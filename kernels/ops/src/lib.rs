//! Operations with a reference and fast variants.
