//! Recipes: model x hardware -> mesh, limits and cache, as typed data, with the ones built in and
//! the published shapes of their models.
//!
//! It starts nothing and does no arithmetic. Invariant: a recipe
//! that parsed has no unknown field and no value out of range, so what it says is what runs.

mod builtin;
mod load;
mod recipe;

pub use builtin::{BuiltIn, builtin, builtins, config_of};
pub use load::{RecipeError, from_file, from_text};
pub use recipe::{
    Cache, CacheDtype, Expect, FIELDS, Field, Hardware, HardwareKind, Limits, Mesh, Model, Recipe,
};
