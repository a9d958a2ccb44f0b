//! The program and the pages agree: every flag, every recipe field and every metric is documented, serve keeps
//! below forty flags, and the tests that the page on faults names are there.

use std::process::Command;

const PROGRAM: &str = env!("CARGO_BIN_EXE_tokenmill");

fn help(command: &[&str]) -> String {
    let output = Command::new(PROGRAM).args(command).arg("--help").output().expect("starts");
    assert!(output.status.success());
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn page(name: &str) -> String {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    std::fs::read_to_string(root.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn flags(help: &str) -> Vec<String> {
    help.lines()
        .map(str::trim_start)
        .filter(|line| line.starts_with('-'))
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with("--")))
        .map(|flag| flag.trim_end_matches(',').to_owned())
        .filter(|flag| flag != "--help" && flag != "--version")
        .collect()
}

#[test]
fn every_flag_is_on_its_page() {
    let page = page("docs/reference/cli.md");
    let commands: [&[&str]; 13] = [
        &["serve"],
        &["chat"],
        &["explain"],
        &["bench", "kernels"],
        &["bench", "latency"],
        &["bench", "throughput"],
        &["bench", "serve"],
        &["bench", "plot"],
        &["bench", "planner"],
        &["bench", "overload"],
        &["model", "explain"],
        &["model", "random"],
        &["model", "fetch"],
    ];
    for command in commands {
        let flags = flags(&help(command));
        assert!(!flags.is_empty(), "{command:?} has flags");
        for flag in flags {
            assert!(page.contains(&format!("`{flag}`")), "{command:?}: {flag} is not in the page");
        }
    }
}

#[test]
fn serve_has_fewer_than_forty_flags() {
    let count = flags(&help(&["serve"])).len();
    assert!((10..40).contains(&count), "{count} flags");
}

#[test]
fn every_recipe_field_is_on_its_page() {
    let page = page("docs/reference/recipe.md");
    for field in recipe::FIELDS {
        let line = format!("| `{}` | {} |", field.name, field.about);
        assert!(page.lines().any(|found| found == line), "docs/reference/recipe.md lacks: {line}");
    }
}

#[test]
fn every_test_of_a_fault_is_there() {
    let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let (mut named, mut files) = (0, 0);
    // Names, each or several followed by their file: `one`, `another` (file).
    let page = page("docs/reliability.md");
    let cells = page.lines().filter_map(|line| line.strip_suffix(" |")?.rsplit("| ").next());
    for cell in cells.filter(|cell| cell.starts_with('`')) {
        for part in cell.split_inclusive(')') {
            let (names, file) = part.rsplit_once(" (").expect("a file in brackets");
            let file = here.join(format!("{}.rs", file.trim_end_matches(')')));
            let text = std::fs::read_to_string(&file).expect("a file of tests");
            files += 1;
            for name in names.split('`').skip(1).step_by(2) {
                let test = format!("#[test]\nfn {name}()");
                assert!(text.contains(&test), "{name} is not in {}", file.display());
                named += 1;
            }
        }
    }
    assert!(files >= 15 && named >= 20, "{named} in {files}");
}

/// `TOKENMILL_WRITE_DOCS=1 cargo test -p tokenmill --test docs` writes the tables anew.
#[test]
fn every_metric_is_on_its_page() {
    const NAME: &str = "docs/reference/metrics.md";
    let page = page(NAME);
    let (text, tables) = page.split_once("\n| metric |").expect("the page has the table");
    let metrics = telemetry::Metrics::new("m", "v");
    metrics.serves_on("cpu", "cpu: why");
    let expected = metrics.reference();
    if std::env::var_os("TOKENMILL_WRITE_DOCS").is_some() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        std::fs::write(root.join(NAME), format!("{text}\n{expected}")).expect("written");
        return;
    }
    let found = format!("| metric |{tables}");
    let lacking = expected.lines().find(|line| !found.lines().any(|found| found == *line));
    assert_eq!(lacking, None, "{NAME} lacks a line");
    assert_eq!(found, expected, "{NAME} has lines that the registry has not");
}
