//! From TOML to a checked [`Recipe`]. Errors name the file and the field.

use crate::Recipe;
use figment::Figment;
use figment::providers::{Format, Toml};
use std::path::{Path, PathBuf};

/// Why a recipe is refused.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// The file cannot be read.
    #[error("cannot read the recipe {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Not TOML, an unknown field, a missing one, or a wrong type.
    #[error("recipe {name}: {reason}")]
    Parse {
        /// File or built-in name.
        name: String,
        /// What figment says, field path included.
        reason: String,
    },
    /// A value that no deployment can have.
    #[error("recipe {name}: {field} is {value}; {rule}")]
    Value {
        /// File or built-in name.
        name: String,
        /// Dotted field.
        field: &'static str,
        /// The value.
        value: String,
        /// What is accepted.
        rule: &'static str,
    },
}

/// Reads a recipe file.
///
/// # Errors
/// When the file cannot be read, or as [`from_text`].
pub fn from_file(path: &Path) -> Result<Recipe, RecipeError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| RecipeError::Read { path: path.to_owned(), source })?;
    from_text(&path.display().to_string(), &text)
}

/// Parses and checks a recipe; `name` is used in errors.
///
/// # Errors
/// The first field that is unknown, missing or out of range.
pub fn from_text(name: &str, text: &str) -> Result<Recipe, RecipeError> {
    let recipe: Recipe = Figment::from(Toml::string(text))
        .extract()
        .map_err(|error| RecipeError::Parse { name: name.to_owned(), reason: error.to_string() })?;
    check(name, &recipe)?;
    Ok(recipe)
}

fn check(name: &str, recipe: &Recipe) -> Result<(), RecipeError> {
    let limits = &recipe.limits;
    let positive = [
        ("hardware.memory_gib", recipe.hardware.memory_gib),
        ("mesh.dp", recipe.mesh.dp.into()),
        ("mesh.tp", recipe.mesh.tp.into()),
        ("limits.max_model_len", limits.max_model_len),
        ("limits.max_num_seqs", limits.max_num_seqs),
        ("limits.max_num_batched_tokens", limits.max_num_batched_tokens),
    ];
    let refuse = |field, value: String, rule| {
        Err(RecipeError::Value { name: name.to_owned(), field, value, rule })
    };
    if let Some((field, value)) = positive.into_iter().find(|(_, value)| *value == 0) {
        return refuse(field, value.to_string(), "it must be at least 1");
    }
    if limits.max_num_batched_tokens < limits.max_num_seqs {
        let value = limits.max_num_batched_tokens.to_string();
        let rule =
            "it must be at least limits.max_num_seqs, so that every request can decode in a step";
        return refuse("limits.max_num_batched_tokens", value, rule);
    }
    let measured = recipe.expect.startup_s.is_some() || recipe.expect.decode_tokens_per_s.is_some();
    if measured && recipe.expect.machine.is_none() {
        let rule = "a measured figure needs the machine it was measured on";
        return refuse("expect.machine", "absent".into(), rule);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        summary = "a model on a processor"
        [model]
        source = "bundled"
        [hardware]
        kind = "cpu"
        memory_gib = 1
        [limits]
        max_model_len = 2048
        max_num_seqs = 16
        max_num_batched_tokens = 512
    "#;

    #[test]
    fn what_is_left_out_has_its_default() {
        let recipe = from_text("good", GOOD).expect("parses");
        assert_eq!(recipe.model.revision, "main");
        assert_eq!((recipe.mesh.dp, recipe.mesh.tp, recipe.mesh.ep), (1, 1, false));
        assert!(recipe.cache.prefix_caching);
    }

    #[test]
    fn a_bad_recipe_is_refused_with_the_field() {
        let cases = [
            (GOOD.replace("kind = \"cpu\"", "kind = \"cpu\"\nspeed = 9"), "speed"),
            (GOOD.replace("max_num_seqs = 16", ""), "max_num_seqs"),
            (GOOD.replace("memory_gib = 1", "memory_gib = -1"), "memory_gib"),
            (GOOD.replace("max_num_seqs = 16", "max_num_seqs = 0"), "limits.max_num_seqs"),
            (GOOD.replace("= 512", "= 8"), "limits.max_num_batched_tokens"),
            (GOOD.replace("\"cpu\"", "\"abacus\""), "kind"),
            (format!("{GOOD}\n[expect]\nstartup_s = 1.0"), "expect.machine"),
            ("summary = ".to_owned(), "bad"),
        ];
        for (text, named) in cases {
            let error = from_text("bad", &text).expect_err(named).to_string();
            assert!(error.contains(named), "{error:?} does not name {named}");
        }
    }
}
