//! The `tokenmill` binary: parse the command, run it, say what went wrong.

mod bench;
mod chat;
mod cli;
mod doctor;
mod explain;
mod first_words;
mod log;
mod model_cmd;
mod model_dir;
mod out;
mod recipe_cmd;
mod serve;
mod terminal;
mod worker_process;

use clap::{CommandFactory, Parser};
use cli::{Cli, Command};
use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let began = Instant::now();
    let cli = Cli::parse();
    match out::unless_closed(log::install().and_then(|()| run(cli, began))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nor is a closed standard error worth a panic.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            if error.is::<bench::Unavailable>() {
                // As when arguments make no sense: nothing was tried.
                ExitCode::from(2)
            } else if error.is::<out::CutShort>() {
                ExitCode::from(out::CutShort::STATUS)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

fn run(cli: Cli, began: Instant) -> anyhow::Result<()> {
    let command = match cli.command {
        Some(command) => command,
        // `tokenmill` alone serves the bundled model, as `tokenmill serve` does.
        None => Cli::try_parse_from(["tokenmill", "serve"])?.command.expect("serve is a command"),
    };
    match command {
        Command::Serve(args) => serve::run(*args, began),
        Command::Chat(args) => chat::run(args),
        Command::Explain(args) => explain::run(&args),
        Command::Bench(command) => bench::run(command),
        Command::Model(command) => model_cmd::run(command),
        Command::Recipe(command) => recipe_cmd::run(command),
        Command::Doctor => {
            out::in_full(doctor::run(), "what was found behind the last line was not told")
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "tokenmill", &mut script);
            out::say_part!("{}", String::from_utf8_lossy(&script))
        }
        Command::Worker(args) => worker_process::run(args),
    }
}
