//! The recipes inside the binary, and the published shapes of the models they name.

/// A recipe that needs no file.
#[derive(Clone, Copy, Debug)]
pub struct BuiltIn {
    /// What `serve` and `recipe` call it.
    pub name: &'static str,
    /// The model's source, as the recipe gives it.
    pub source: &'static str,
    /// The recipe.
    pub text: &'static str,
    /// The model's config.json.
    pub config: &'static str,
}

macro_rules! built_in {
    ($folder:literal, $source:literal) => {
        BuiltIn {
            name: concat!($folder, "-cpu"),
            source: $source,
            text: include_str!(concat!("../../", $folder, "/cpu.toml")),
            config: include_str!(concat!("../../", $folder, "/config.json")),
        }
    };
}

/// All of them.
const ALL: [BuiltIn; 7] = [
    built_in!("bundled", "bundled"),
    built_in!("qwen3-0.6b", "Qwen/Qwen3-0.6B"),
    built_in!("qwen3-8b", "Qwen/Qwen3-8B"),
    built_in!("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B"),
    built_in!("llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct"),
    built_in!("deepseek-v2-lite", "deepseek-ai/DeepSeek-V2-Lite-Chat"),
    built_in!("moonlight-16b-a3b", "moonshotai/Moonlight-16B-A3B-Instruct"),
];

/// Every built-in recipe.
#[must_use]
pub const fn builtins() -> &'static [BuiltIn] {
    &ALL
}

/// The built-in recipe of this name.
#[must_use]
pub fn builtin(name: &str) -> Option<&'static BuiltIn> {
    ALL.iter().find(|recipe| recipe.name == name)
}

/// The published config.json of a source that a built-in recipe names.
#[must_use]
pub fn config_of(source: &str) -> Option<&'static str> {
    ALL.iter().find(|recipe| recipe.source == source).map(|recipe| recipe.config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_recipe_parses_and_names_its_source() {
        for built_in in builtins() {
            let recipe = crate::from_text(built_in.name, built_in.text).expect(built_in.name);
            assert_eq!(recipe.model.source, built_in.source);
        }
    }
}
