//! `tokenmill recipe`: list, check, plan, explain.

use crate::cli::RecipeCommand;
use crate::model_dir::ModelDir;
use crate::out::{in_full, say};
use crate::serve::memory_plan::{Machine, MemoryPlan, Wanted, plan};
use anyhow::{Context, Result, bail};
use recipe::{CacheDtype, Recipe};
use std::path::Path;

/// Runs one of the commands.
pub(crate) fn run(command: RecipeCommand) -> Result<()> {
    match command {
        RecipeCommand::List => {
            for built_in in recipe::builtins() {
                let recipe = load(built_in.name)?;
                say!("{:<24} {}", built_in.name, recipe.summary)?;
            }
        }
        RecipeCommand::Check { recipes } => {
            in_full(check(&recipes), "recipes behind the last line were not checked")?;
        }
        RecipeCommand::Plan { recipe } => {
            let loaded = load(&recipe)?;
            let plan = memory_plan(&loaded)?;
            say!("{recipe}: 1 process ({} rank on cpu)\n{plan}", loaded.mesh.tp)?;
        }
        RecipeCommand::Explain { recipe } => {
            load(&recipe)?;
            let text = text_of(&recipe)?;
            let given: toml::Table = text.parse().context("parse the recipe")?;
            for field in recipe::FIELDS {
                let shown =
                    lookup(&given, field.name).map_or("(default)".into(), |v| v.to_string());
                say!("{:<32} {shown:<40} {}", field.name, field.about)?;
            }
        }
    }
    Ok(())
}

/// A built-in recipe or a file.
pub(crate) fn load(name: &str) -> Result<Recipe> {
    match recipe::builtin(name) {
        Some(built_in) => Ok(recipe::from_text(name, built_in.text)?),
        None => Ok(recipe::from_file(Path::new(name))?),
    }
}

fn text_of(name: &str) -> Result<String> {
    match recipe::builtin(name) {
        Some(built_in) => Ok(built_in.text.to_owned()),
        None => std::fs::read_to_string(name).with_context(|| format!("read {name}")),
    }
}

fn lookup<'a>(table: &'a toml::Table, name: &str) -> Option<&'a toml::Value> {
    match name.split_once('.') {
        None => table.get(name),
        Some((first, rest)) => lookup(table.get(first)?.as_table()?, rest),
    }
}

fn check(names: &[String]) -> Result<()> {
    let all: Vec<String> = match names {
        [] => recipe::builtins().iter().map(|r| r.name.to_owned()).collect(),
        given => given.to_vec(),
    };
    let mut bad = 0;
    for name in all {
        match load(&name).and_then(|recipe| memory_plan(&recipe)) {
            Ok(plan) => say!("ok   {name}: {} KV tokens", plan.kv_tokens)?,
            Err(error) => {
                bad += 1;
                say!("BAD  {name}: {error:#}")?;
            }
        }
    }
    if bad > 0 {
        bail!("{bad} recipes are not usable");
    }
    Ok(())
}

/// The plan of one rank on the hardware the recipe names.
fn memory_plan(recipe: &Recipe) -> Result<MemoryPlan> {
    let source = &recipe.model.source;
    let dir = match recipe::config_of(source) {
        Some(config) => {
            let folder = tempfile::tempdir().context("create a temporary folder")?;
            let file = folder.path().join("config.json");
            std::fs::write(&file, config).context("write the configuration")?;
            ModelDir::read(&file)?
        }
        None => ModelDir::read(Path::new(source)).with_context(|| {
            format!("{source} is not among the built-in shapes and no folder here")
        })?,
    };
    let float32 = dir.matrix_dtype(None) == weights::Dtype::F32;
    let kv_element = match recipe.cache.dtype {
        CacheDtype::Float32 => 4,
        CacheDtype::Auto if float32 => 4,
        CacheDtype::Auto | CacheDtype::Bfloat16 => 2,
    };
    plan(
        &dir,
        &Wanted {
            weight_element: if float32 { 4 } else { 2 },
            kv_element,
            max_context: Some(recipe.limits.max_model_len),
            max_seqs: recipe.limits.max_num_seqs,
            max_step_tokens: recipe.limits.max_num_batched_tokens,
            kv_bytes: recipe.cache.bytes,
            host_bytes: recipe.cache.host_bytes,
            machine: Machine::Cpu {
                threads: recipe.hardware.threads.map_or(1, usize::from),
                available: Some(u64::from(recipe.hardware.memory_gib) << 30),
            },
            ranks: 1,
        },
    )
}
