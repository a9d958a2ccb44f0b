//! A request's history as JSON: times in milliseconds since its client was heard.
//!
//! Spelling only; what is told was found by the journal. Invariant: parts touch, and none lies behind
//! `until`: what happened after a client had its answer is no part of its latency.

use ids::Timestamp;
use scheduler::{History, Part, Role, Span, StepShare, Wait, Waits};
use serde_json::{Value, json};
use std::time::Duration;

/// Steps that are told one by one; of more, the newest.
const STEPS: usize = 20_000;
/// Others that are named.
const MATES: usize = 32;

/// Spells a history. `zero` is when its client was heard, `until` when that had its answer.
pub(super) fn spell(history: &History, zero: Timestamp, until: Option<Timestamp>) -> Value {
    let at = |time: Timestamp| millis(time, zero);
    let left_out = history.steps.len().saturating_sub(STEPS);
    let parts = history.spans.iter().filter_map(|span| part(span, zero, until));
    let mates = history.mates.iter().take(MATES);
    json!({
        "state": match (&history.ending, history.steps.last()) {
            (Some(_), _) => "ended",
            (None, Some(_)) => "running",
            (None, None) => "waiting",
        },
        "ended_by": history.ending.map(|(ending, _)| ending.label()),
        "prompt_tokens": history.prompt.0,
        "cached_tokens": history.cached.0,
        "output_tokens": history.ending.map(|(_, output)| output.0),
        "preemptions": history.preemptions,
        "begin_written_over": history.cut,
        "first_token_ms": history.first_token.map(at),
        "parts": parts.collect::<Vec<_>>(),
        "steps_left_out": left_out,
        "steps": history.steps[left_out..].iter().map(|s| step(s, zero)).collect::<Vec<_>>(),
        "shared_with": mates
            .map(|(request, steps)| json!({ "generation": request.0, "steps": steps }))
            .collect::<Vec<_>>(),
    })
}

fn part(span: &Span, zero: Timestamp, until: Option<Timestamp>) -> Option<Value> {
    let to = until.map_or(span.to, |until| until.min(span.to));
    if to < span.from || (to == span.from && span.steps == 0) {
        return None;
    }
    let mut value = json!({
        "part": span.part.label(),
        "from_ms": millis(span.from, zero),
        "ms": millis(to, span.from),
        "steps": span.steps,
    });
    if let Some((first, last)) = span.seqs {
        value["first_step"] = first.0.into();
        value["last_step"] = last.0.into();
    }
    if let Some((wait, word)) = span.part.waits() {
        value["for"] = word.into();
        value["why"] = why(wait).into();
        if let Wait::Behind { head, .. } = wait {
            value["behind"] = head.0.into();
        }
    }
    if let Part::Prefill(tokens) = span.part {
        value["tokens"] = tokens.0.into();
    }
    Some(value)
}

fn step(step: &StepShare, zero: Timestamp) -> Value {
    let at = |time: Option<Timestamp>| time.map(|time| millis(time, zero));
    let ms = |time: Option<Duration>| time.map(|time| time.as_secs_f64() * 1e3);
    let (role, tokens) = match step.role {
        Role::Prefill { tokens, .. } => ("prefill", tokens.0),
        Role::Decode => ("decode", 1),
    };
    json!({
        "step": step.seq.0,
        "role": role,
        "tokens": tokens,
        "draws": step.role != Role::Prefill { tokens: ids::Tokens(tokens), sample: false },
        "planned_ms": at(Some(step.planned)),
        "start_ms": at(step.start),
        "answered_ms": at(step.answered),
        "delivered_ms": at(step.delivered),
        "worker_ms": ms(step.took),
        "model_ms": ms(step.model),
        "predicted_ms": ms(step.predicted),
        "decoding": step.decode,
        "prompts": step.chunks,
        "prompt_tokens": step.prefill.0,
        "steps_ahead": step.ahead,
        "running": step.running,
        "waiting": step.waiting,
        "cache_percent": step.cache_percent,
        "lost": step.lost,
        "dropped": step.dropped,
        "beside": step
            .beside
            .iter()
            .map(|(request, tokens)| json!({ "generation": request.0, "tokens": tokens.0 }))
            .collect::<Vec<_>>(),
    })
}

/// Milliseconds from `zero` to `time`; below zero where it was before.
fn millis(time: Timestamp, zero: Timestamp) -> f64 {
    let ahead = zero.since(time).as_secs_f64();
    (time.since(zero).as_secs_f64() - ahead) * 1e3
}

/// What was waited for, in words for an operator.
fn why(wait: Wait) -> String {
    match wait {
        Wait::For(waits) => short_of(waits),
        Wait::Behind { head, waits } => {
            format!("behind generation {head}, which waited for {}", short_of(waits))
        }
        Wait::NextPlan => "the next plan".to_owned(),
        Wait::Outcome => "the outcome of its last step".to_owned(),
    }
}

fn short_of(waits: Waits) -> String {
    match waits {
        Waits::Worker => "a worker: none served".to_owned(),
        Waits::Upload => "its tokens to leave for the worker".to_owned(),
        Waits::Slot { rows, arriving } => {
            format!("a slot: all {rows} (--max-num-seqs) were taken, {arriving} about to be free")
        }
        Waits::Blocks { group, need, mintable, arriving } => format!(
            "KV blocks of group {group}: {need} wanted, {mintable} to be had, {arriving} on their way"
        ),
        Waits::StepTokens { limit } => {
            format!("room in a step: others took its {limit} tokens (--max-num-batched-tokens)")
        }
        Waits::DecodeBudget { budget } => {
            format!("time in a step: decoding left no more of {budget:?} (--max-step-ms)")
        }
        Waits::Turn { ahead } => format!("its turn: {ahead} stood before it"),
        Waits::Isolation => "a request that workers died under, which runs alone".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ids::{RequestId, Tokens};

    const MS: u64 = 1_000_000;

    fn history(spans: Vec<Span>) -> History {
        History {
            request: RequestId(3),
            arrival: Timestamp(5 * MS),
            end: None,
            ending: None,
            first_token: Some(Timestamp(9 * MS)),
            cut: false,
            prompt: Tokens(10),
            cached: Tokens(0),
            preemptions: 0,
            spans,
            steps: Vec::new(),
            mates: (0..100).map(|i| (RequestId(i), 1)).collect(),
        }
    }

    #[test]
    fn times_are_the_clients_and_nothing_lies_behind_its_answer() {
        let wait = Wait::Behind { head: RequestId(7), waits: Waits::Slot { rows: 4, arriving: 1 } };
        let span = |from, to, part| Span {
            from: Timestamp(from * MS),
            to: Timestamp(to * MS),
            part,
            steps: 1,
            seqs: None,
        };
        let spans = vec![
            span(5, 8, Part::Queued { wait, again: false }),
            span(8, 12, Part::Prefill(Tokens(10))),
            span(12, 20, Part::Decode),
            span(20, 21, Part::Deliver),
        ];
        let told = spell(&history(spans), Timestamp(4 * MS), Some(Timestamp(15 * MS)));
        let parts = told["parts"].as_array().expect("a list");
        let lengths: Vec<_> = parts.iter().map(|part| part["ms"].as_f64()).collect();
        assert_eq!(lengths, [Some(3.0), Some(4.0), Some(3.0)]);
        assert_eq!((&parts[0]["from_ms"], &told["first_token_ms"]), (&json!(1.0), &json!(5.0)));
        assert_eq!((&parts[0]["for"], &parts[0]["behind"]), (&json!("slot"), &json!(7)));
        let why = parts[0]["why"].as_str().expect("words");
        assert!(why.starts_with("behind generation 7, which waited for a slot: all 4"), "{why}");
        assert_eq!(told["shared_with"].as_array().map(Vec::len), Some(MATES));
        assert_eq!(told["state"], "waiting");
    }
}
