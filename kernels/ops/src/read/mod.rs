//! Reading memory and keeping nothing: what a device's memory gives at best, for measurements to be
//! held against. No program contains it.

pub mod cuda;
