//! What `tokenmill explain` prints: a bar to look at, a table to read, and the slowest steps.
//!
//! Pure: an answer in, text out. Invariant: the table's parts are all parts, so its column adds up to
//! the total above it.

use serde::Deserialize;
use std::fmt::Write;

/// Columns of the bar.
const BAR: usize = 72;
/// Steps that are told although not all are asked for.
const SLOWEST: usize = 6;
/// Others that are named.
const MATES: usize = 8;
/// Parts that are told in their order; more are summed by kind.
const ROWS: usize = 40;
/// A pause of the host between two steps that gets no row of its own.
const PAUSE_MS: f64 = 1.0;

/// What the server says of a request.
#[derive(Debug, Deserialize)]
pub(super) struct Answer {
    id: String,
    client_id: Option<String>,
    others_of_this_client_id: usize,
    door: String,
    replied_ms: Option<f64>,
    generations: Vec<Generation>,
}

#[derive(Debug, Deserialize)]
struct Generation {
    generation: u64,
    story: Option<Story>,
    error: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Story {
    state: String,
    ended_by: Option<String>,
    prompt_tokens: u32,
    cached_tokens: u32,
    output_tokens: Option<u32>,
    preemptions: u32,
    begin_written_over: bool,
    first_token_ms: Option<f64>,
    parts: Vec<Part>,
    steps_left_out: usize,
    steps: Vec<Step>,
    shared_with: Vec<Mate>,
}

#[derive(Clone, Debug, Deserialize)]
struct Part {
    part: String,
    /// Of it, short pauses between its steps.
    #[serde(skip)]
    paused_ms: f64,
    from_ms: f64,
    ms: f64,
    steps: u32,
    first_step: Option<u64>,
    last_step: Option<u64>,
    r#for: Option<String>,
    why: Option<String>,
    tokens: Option<u32>,
}

#[derive(Debug, Deserialize)]
struct Step {
    step: u64,
    role: String,
    tokens: u32,
    start_ms: Option<f64>,
    answered_ms: Option<f64>,
    worker_ms: Option<f64>,
    model_ms: Option<f64>,
    decoding: u32,
    prompt_tokens: u32,
    lost: bool,
    dropped: bool,
    beside: Vec<Beside>,
}

#[derive(Debug, Deserialize)]
struct Beside {
    generation: u64,
    tokens: u32,
}

#[derive(Debug, Deserialize)]
struct Mate {
    generation: u64,
    steps: u32,
}

impl Step {
    fn ms(&self) -> Option<f64> {
        Some(self.answered_ms? - self.start_ms?)
    }
}

/// Each kind of part: its name in answers, its letter in the bar, and what it is.
const KINDS: [(&str, char, &str); 12] = [
    ("gateway", 'g', "read, checked, tokenised"),
    ("queued", '.', "in line for"),
    ("queued_again", ':', "in line again for"),
    ("ahead", 'a', "steps planned before it came"),
    ("host", 'h', "no step ran: planning and sending"),
    ("prefill", 'P', "prompt"),
    ("decode", 'D', "a token each step"),
    ("stalled", 's', "had a slot, steps went without it for want of"),
    ("lost", 'x', "in a step when the worker died"),
    ("deliver", 'd', "results to the gateway"),
    ("reply", 'r', "text, other choices, and to the client's connection"),
    ("", '?', "of a kind that this version does not know"),
];

fn kind(name: &str) -> (&'static str, char, &'static str) {
    *KINDS.iter().find(|kind| kind.0 == name).unwrap_or(&KINDS[KINDS.len() - 1])
}

/// The page; with every step's line where `steps`.
pub(super) fn write(answer: &Answer, steps: bool) -> String {
    let mut page = String::new();
    let _ = page.write_fmt(format_args!("request {} at {}", answer.id, answer.door));
    if let Some(name) = &answer.client_id {
        let _ = write!(page, ", its client's {name}");
        if answer.others_of_this_client_id > 0 {
            let others = answer.others_of_this_client_id;
            let _ = write!(page, " (the newest; {others} older ones bear the same name)");
        }
    }
    let _ = match answer.replied_ms {
        Some(ms) => writeln!(page, ": answered after {ms:.1} ms"),
        None => writeln!(page, ": not answered yet"),
    };
    for generation in &answer.generations {
        let _ = write!(page, "\ngeneration {}: ", generation.generation);
        match (&generation.story, &generation.error) {
            (Some(story), _) => story.write(&mut page, steps),
            (None, Some(error)) => {
                let _ = writeln!(page, "{error}");
            }
            (None, None) => {
                let _ = writeln!(page, "nothing is known");
            }
        }
    }
    page
}

impl Story {
    fn write(&self, page: &mut String, steps: bool) {
        let ended = self.ended_by.as_deref().map_or(String::new(), |by| format!(" by {by}"));
        let output = self.output_tokens.map_or(String::new(), |n| format!(", {n} generated"));
        let _ = writeln!(
            page,
            "{}{ended}; prompt of {} tokens, {} of them cached{output}",
            self.state, self.prompt_tokens, self.cached_tokens
        );
        if self.begin_written_over {
            let _ = writeln!(page, "its begin was written over: --journal-bytes keeps more");
        }
        if let Some(ms) = self.first_token_ms {
            let _ = writeln!(page, "first token after {ms:.1} ms");
        }
        if self.preemptions > 0 {
            let _ =
                writeln!(page, "lost its slot {} times to requests before it", self.preemptions);
        }
        self.bar(page);
        self.table(page);
        if steps {
            let all: Vec<&Step> = self.steps.iter().collect();
            if self.steps_left_out > 0 {
                let _ = writeln!(page, "\n{} steps before these are left out", self.steps_left_out);
            }
            lines(page, "steps", &all);
        } else {
            lines(page, "slowest steps (--steps for all)", &self.slowest());
        }
        if !self.shared_with.is_empty() {
            let named = self.shared_with.iter().take(MATES);
            let named: Vec<String> =
                named.map(|mate| format!("{} in {}", mate.generation, mate.steps)).collect();
            let _ = writeln!(page, "\ngenerations in its steps: {}", named.join(", "));
        }
    }

    fn span(&self) -> (f64, f64) {
        let from = self.parts.first().map_or(0.0, |part| part.from_ms);
        let to = self.parts.last().map_or(0.0, |part| part.from_ms + part.ms);
        (from, to)
    }

    /// One letter per column: the part that takes most of it.
    fn bar(&self, page: &mut String) {
        let (from, to) = self.span();
        let width = (to - from) / BAR as f64;
        if width <= 0.0 {
            return;
        }
        let letter = |column: usize| {
            let (a, b) = (from + width * column as f64, from + width * (column + 1) as f64);
            let within = |part: &Part| (part.from_ms + part.ms).min(b) - part.from_ms.max(a);
            let most = self.parts.iter().max_by(|x, y| within(x).total_cmp(&within(y)));
            most.map_or(' ', |part| kind(&part.part).1)
        };
        let bar: String = (0..BAR).map(letter).collect();
        let shown: Vec<String> = KINDS
            .iter()
            .filter(|kind| bar.contains(kind.1))
            .map(|kind| format!("{} {}", kind.1, kind.0))
            .collect();
        let _ = writeln!(page, "\n  |{bar}|\n   {}", shown.join("  "));
    }

    fn table(&self, page: &mut String) {
        let (from, to) = self.span();
        let _ = writeln!(page, "\n{:>11}{:>11}{:>7}  part", "from ms", "ms", "%");
        for part in &rows(&self.parts) {
            let share = if to > from { 100.0 * part.ms / (to - from) } else { 0.0 };
            let (_, _, about) = kind(&part.part);
            let _ = write!(
                page,
                "{:>11.1}{:>11.1}{share:>7.1}  {:<13}{about}",
                part.from_ms, part.ms, part.part
            );
            if let Some(why) = &part.why {
                let _ = write!(page, " {why}");
            }
            if let Some(tokens) = part.tokens {
                let _ = write!(page, ", {tokens} tokens");
            }
            if part.paused_ms >= 0.05 {
                let _ = write!(page, ", {:.1} ms of it between steps", part.paused_ms);
            }
            let _ = match (part.steps, part.first_step, part.last_step) {
                (1, Some(first), _) => writeln!(page, " [step {first}]"),
                (n, Some(first), Some(last)) if n > 0 => {
                    let each = part.ms / f64::from(n);
                    writeln!(page, " [{n} steps, {first} to {last}, {each:.1} ms each]")
                }
                _ => writeln!(page),
            };
        }
        let total: f64 = self.parts.iter().map(|part| part.ms).sum();
        let _ = writeln!(page, "{:>11}{total:>11.1}{:>7.1}  all", "", 100.0);
    }

    fn slowest(&self) -> Vec<&Step> {
        let mut steps: Vec<&Step> = self.steps.iter().filter(|step| step.ms().is_some()).collect();
        steps.sort_by(|a, b| b.ms().unwrap_or(0.0).total_cmp(&a.ms().unwrap_or(0.0)));
        steps.truncate(SLOWEST);
        steps
    }
}

/// What the table shows: without short pauses between steps, and summed by kind where that is long.
fn rows(parts: &[Part]) -> Vec<Part> {
    let mut rows: Vec<Part> = Vec::new();
    for (at, part) in parts.iter().enumerate() {
        let pause = part.part == "host" && part.ms < PAUSE_MS;
        let goes_on = |last: &Part| parts.get(at + 1).is_some_and(|next| next.part == last.part);
        match rows.last_mut() {
            Some(last)
                if pause
                    && matches!(&*last.part, "decode" | "prefill" | "dropped")
                    && goes_on(last) =>
            {
                last.ms += part.ms;
                last.paused_ms += part.ms;
            }
            Some(last) if last.paused_ms > 0.0 && last.part == part.part => last.add(part),
            _ => rows.push(part.clone()),
        }
    }
    if rows.len() <= ROWS {
        return rows;
    }
    let mut sums: Vec<Part> = Vec::new();
    for part in rows {
        match sums.iter_mut().find(|sum| (&sum.part, &sum.r#for) == (&part.part, &part.r#for)) {
            Some(sum) => sum.add(&part),
            None => sums.push(part),
        }
    }
    sums
}

impl Part {
    fn add(&mut self, other: &Self) {
        self.ms += other.ms;
        self.paused_ms += other.paused_ms;
        self.steps += other.steps;
        self.last_step = other.last_step.or(self.last_step);
        self.tokens = self.tokens.zip(other.tokens).map(|(a, b)| a + b);
    }
}

fn lines(page: &mut String, title: &str, steps: &[&Step]) {
    if steps.is_empty() {
        return;
    }
    let _ = writeln!(
        page,
        "\n{title}\n{:>11}{:>11}{:>11}{:>11}{:>9}  what ran",
        "from ms", "ms", "worker ms", "model ms", "step"
    );
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
    for step in steps {
        let _ = write!(
            page,
            "{:>11}{:>11}{:>11}{:>11}{:>9}  {}",
            number(step.start_ms),
            number(step.ms()),
            number(step.worker_ms),
            number(step.model_ms),
            step.step,
            step.role
        );
        if step.role != "decode" {
            let _ = write!(page, " of {} tokens", step.tokens);
        }
        let _ = write!(page, "; {} decoded, {} prompt tokens", step.decoding, step.prompt_tokens);
        for beside in &step.beside {
            let _ = write!(page, ", {} of generation {}", beside.tokens, beside.generation);
        }
        let fate = match (step.lost, step.dropped) {
            (true, _) => "; lost with its worker",
            (_, true) => "; dropped with its slot",
            (false, false) => "",
        };
        let _ = writeln!(page, "{fate}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn step(step: u64, from: f64, ms: f64, tokens: u32) -> serde_json::Value {
        json!({
            "step": step, "role": if tokens > 1 { "prefill" } else { "decode" }, "tokens": tokens,
            "start_ms": from, "answered_ms": from + ms, "worker_ms": ms, "model_ms": ms / 2.0,
            "decoding": 3, "prompt_tokens": 40, "lost": false, "dropped": false,
            "beside": [{ "generation": 9, "tokens": 40 }],
        })
    }

    #[test]
    fn the_page_adds_up_and_shows_what_was_long() {
        let answer = json!({
            "id": "ab", "client_id": "mine", "others_of_this_client_id": 1,
            "door": "/v1/completions", "replied_ms": 100.0,
            "generations": [
                {"generation": 7, "story": {
                    "state": "ended", "ended_by": "length", "prompt_tokens": 64, "cached_tokens": 0,
                    "output_tokens": 2, "preemptions": 0, "begin_written_over": false,
                    "first_token_ms": 76.0,
                    "parts": [
                        {"part": "gateway", "from_ms": 0.0, "ms": 1.0, "steps": 0},
                        {"part": "queued", "from_ms": 1.0, "ms": 50.0, "steps": 5, "first_step": 1,
                         "last_step": 5, "for": "slot", "why": "a slot: all 2 were taken"},
                        {"part": "prefill", "from_ms": 51.0, "ms": 25.0, "steps": 1, "first_step": 6,
                         "last_step": 6, "tokens": 64},
                        {"part": "decode", "from_ms": 76.0, "ms": 20.0, "steps": 1, "first_step": 7,
                         "last_step": 7},
                        {"part": "novel", "from_ms": 96.0, "ms": 4.0, "steps": 0},
                    ],
                    "steps_left_out": 0,
                    "steps": [step(6, 51.0, 25.0, 64), step(7, 76.0, 20.0, 1)],
                    "shared_with": [{ "generation": 9, "steps": 2 }],
                }},
                {"generation": 8, "error": "its lines were written over"},
            ],
        });
        let answer: Answer = serde_json::from_value(answer).expect("the form");
        let page = write(&answer, false);
        for line in [
            "request ab at /v1/completions, its client's mine (the newest; 1 older ones bear the same \
             name): answered after 100.0 ms",
            "first token after 76.0 ms",
            "in line for a slot: all 2 were taken [5 steps, 1 to 5, 10.0 ms each]",
            "prompt, 64 tokens [step 6]",
            "                 100.0  100.0  all",
            "generations in its steps: 9 in 2",
            "generation 8: its lines were written over",
        ] {
            assert!(page.contains(line), "{line:?} is not in\n{page}");
        }
        let bar = page.lines().find(|line| line.starts_with("  |")).expect("a bar");
        let count = |letter: char| bar.chars().filter(|c| *c == letter).count();
        assert_eq!((count('.'), count('P'), count('D'), count('?')), (36, 18, 14, 3), "{bar}");
        assert!(page.contains("slowest steps"));
        assert!(write(&answer, true).contains("\nsteps\n"));
    }

    fn part(part: &str, ms: f64, why: Option<&str>) -> Part {
        let from_ms = 0.0;
        let value = json!({ "part": part, "from_ms": from_ms, "ms": ms, "steps": 1, "first_step": 1,
                            "last_step": 1, "for": why });
        serde_json::from_value(value).expect("the form")
    }

    #[test]
    fn short_pauses_and_many_rows_are_summed_and_nothing_is_lost() {
        let told = |parts: &[Part]| -> Vec<(String, f64, u32)> {
            rows(parts).into_iter().map(|row| (row.part, row.ms, row.steps)).collect()
        };
        let paused = ["decode", "host", "decode", "host", "decode", "host", "deliver"];
        let short: Vec<Part> = paused.iter().map(|name| part(name, 0.5, None)).collect();
        let rows = [("decode".into(), 2.5, 3), ("host".into(), 0.5, 1), ("deliver".into(), 0.5, 1)];
        assert_eq!(told(&short), rows);
        let long: Vec<Part> = paused.iter().map(|name| part(name, 2.0, None)).collect();
        assert_eq!(told(&long).len(), 7, "long pauses have rows of their own");
        let why = [Some("slot"), Some("blocks")];
        let many: Vec<Part> = (0..100).map(|i| part("queued", 2.0, why[i % 2])).collect();
        assert_eq!(told(&many), [("queued".into(), 100.0, 50), ("queued".into(), 100.0, 50)]);
    }
}
