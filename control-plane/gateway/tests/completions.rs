//! `/v1/completions` end to end over loopback: shapes, counts, and streamed = whole.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use common::Server;
use common::engine::{Ended, FakeEngine, MAX_CONTEXT};
use common::model::{self, END};
use ids::{TokenId, Tokens};
use serde_json::{Value, json};

const DOOR: &str = "/v1/completions";

#[tokio::test]
async fn a_reply_has_the_fields_of_openai() {
    let server = Server::start(FakeEngine::say("Hello")).await;
    let reply = server.ok(DOOR, json!({"model": "tiny", "prompt": "Hi!", "max_tokens": 9})).await;
    assert!(reply["id"].as_str().unwrap().starts_with("cmpl-"));
    assert!(reply["created"].is_u64());
    assert_eq!(reply["object"], "text_completion");
    assert_eq!(reply["model"], "tiny");
    let choice = json!({"index": 0, "text": "Hello", "logprobs": null, "finish_reason": "stop",
                        "stop_reason": null});
    assert_eq!(reply["choices"], json!([choice]));
    let usage = json!({"prompt_tokens": 3, "total_tokens": 9, "completion_tokens": 6,
                       "prompt_tokens_details": {"cached_tokens": 3}});
    assert_eq!(reply["usage"], usage);
}

#[tokio::test]
async fn every_shape_of_prompt_is_taken() {
    let server = Server::start(FakeEngine::say("ok")).await;
    let cases = [
        (json!("ab"), vec![vec![97, 98]]),
        (json!(["ab", "c"]), vec![vec![97, 98], vec![99]]),
        (json!([97, 98]), vec![vec![97, 98]]),
        (json!([[97], [98, 256]]), vec![vec![97], vec![98, 256]]),
    ];
    for (prompt, tokens) in cases {
        let body = json!({"prompt": prompt, "n": 2, "return_token_ids": true});
        let reply = server.ok(DOOR, body).await;
        let choices = reply["choices"].as_array().unwrap();
        assert_eq!(choices.len(), 2 * tokens.len());
        for (index, choice) in choices.iter().enumerate() {
            assert_eq!(choice["index"], index);
            assert_eq!(choice["prompt_token_ids"], json!(tokens[index / 2]));
            assert_eq!(choice["token_ids"], json!([111, 107, END]));
        }
        let prompt_tokens: usize = tokens.iter().map(Vec::len).sum();
        assert_eq!(reply["usage"]["prompt_tokens"], prompt_tokens);
        assert_eq!(reply["usage"]["completion_tokens"], 6 * tokens.len());
    }
}

#[tokio::test]
async fn choices_of_one_request_share_a_seed_and_differ_in_number() {
    let server = Server::start(FakeEngine::say("x")).await;
    server.ok(DOOR, json!({"prompt": "a", "n": 3, "seed": -5})).await;
    let requests = server.engine.requests.lock().unwrap();
    let keys: Vec<_> =
        requests.iter().map(|r| (r.sampling.seed as i64, r.sampling.choice)).collect();
    assert_eq!(keys, [(-5, 0), (-5, 1), (-5, 2)]);
}

#[tokio::test]
async fn what_the_client_asks_reaches_the_engine() {
    let server = Server::start(FakeEngine::say("x")).await;
    let body = json!({
        "prompt": "abc", "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "seed": 3,
        "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.5,
        "logit_bias": {"9": -100, "2": 5}, "max_tokens": 8, "min_tokens": 2,
        "stop_token_ids": [120, 5], "logprobs": 4, "priority": -3, "cache_salt": "s",
        "user": "u-1"
    });
    server.ok(DOOR, body).await;
    let request = server.engine.last_request();
    let sampling = &request.sampling;
    assert_eq!((sampling.temperature, sampling.top_k, sampling.top_p), (0.5, 7, 0.9));
    assert_eq!((sampling.min_p, sampling.seed, sampling.logprobs), (0.1, 3, Some(4)));
    assert_eq!((sampling.presence_penalty, sampling.frequency_penalty), (1.0, -1.0));
    assert_eq!(sampling.repetition_penalty, 1.5);
    assert_eq!(*sampling.logit_bias, [(TokenId(2), 5.0), (TokenId(9), -100.0)]);
    let stops = [TokenId(5), TokenId(120), TokenId(END)];
    assert_eq!(*request.stop_token_ids, stops);
    assert_eq!((sampling.min_tokens, &*sampling.banned_before_min), (Tokens(2), &stops[..]));
    assert_eq!((request.max_tokens, request.priority), (Tokens(8), -3));
    assert_eq!(request.cache_salt.as_deref(), Some("s"));
    assert_eq!(request.tenant.as_deref(), Some("u-1"));
}

#[tokio::test]
async fn defaults_come_from_the_model_and_then_from_openai() {
    let server = Server::start(FakeEngine::say("x")).await;
    server.ok(DOOR, json!({"prompt": "a"})).await;
    let request = server.engine.last_request();
    assert_eq!((request.sampling.temperature, request.max_tokens), (1.0, Tokens(16)));
    server.ok(DOOR, json!({"prompt": "a", "ignore_eos": true, "top_k": -1})).await;
    let request = server.engine.last_request();
    assert_eq!((request.stop_token_ids.len(), request.sampling.top_k), (0, 0));

    let generation = json!({"eos_token_id": [END, 5], "temperature": 0.6, "top_k": 20,
                            "top_p": 0.95, "max_new_tokens": 40, "do_sample": true});
    let folder = model::folder_with(generation);
    let server = Server::with(FakeEngine::say("x"), folder, common::limits()).await;
    server.ok(DOOR, json!({"prompt": "a", "top_p": 0.5, "temperature": null})).await;
    let request = server.engine.last_request();
    let sampling = &request.sampling;
    assert_eq!((sampling.temperature, sampling.top_k, sampling.top_p), (0.6, 20, 0.5));
    assert_eq!(request.max_tokens, Tokens(40));
    assert_eq!(*request.stop_token_ids, [TokenId(5), TokenId(END)]);
}

#[tokio::test]
async fn stop_strings_cut_text_and_tell_the_engine_how_much_to_keep() {
    for batch in [1, 3, 64] {
        let engine = FakeEngine { batch, ..FakeEngine::say("one END two") };
        let server = Server::start(engine).await;
        let body = json!({"prompt": "a", "max_tokens": 50, "stop": ["nope", "END"]});
        let reply = server.ok(DOOR, body).await;
        assert_eq!(reply["choices"][0]["text"], "one ");
        assert_eq!(reply["choices"][0]["finish_reason"], "stop");
        assert_eq!(reply["choices"][0]["stop_reason"], "END");
        assert_eq!(reply["usage"]["completion_tokens"], 7);
        assert_eq!(server.engine.ended(1).await, [Ended::Stopped(Tokens(7))]);

        let body = json!({"prompt": "a", "max_tokens": 50, "stop": "END",
                          "include_stop_str_in_output": true});
        assert_eq!(server.ok(DOOR, body).await["choices"][0]["text"], "one END");
        let body = json!({"prompt": "a", "max_tokens": 12, "stop": "END", "min_tokens": 7});
        assert_eq!(server.ok(DOOR, body).await["choices"][0]["text"], "one END two");
    }
}

#[tokio::test]
async fn a_stop_token_ends_the_answer_and_is_named() {
    let server = Server::start(FakeEngine::say("abcd")).await;
    let body = json!({"prompt": "a", "stop_token_ids": [99], "return_token_ids": true});
    let choice = &server.ok(DOOR, body).await["choices"][0];
    assert_eq!((&choice["text"], &choice["stop_reason"]), (&json!("ab"), &json!(99)));
    assert_eq!(choice["token_ids"], json!([97, 98, 99]));
    let body = json!({"prompt": "a", "max_tokens": 2});
    assert_eq!(server.ok(DOOR, body).await["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn special_tokens_are_shown_only_when_asked_for() {
    let mut engine = FakeEngine::say("a");
    engine.answer.extend([common::model::START, 98]);
    let server = Server::start(engine).await;
    let text = |reply: Value| reply["choices"][0]["text"].as_str().unwrap().to_owned();
    assert_eq!(text(server.ok(DOOR, json!({"prompt": "a"})).await), "ab");
    let body = json!({"prompt": "a", "skip_special_tokens": false});
    assert_eq!(text(server.ok(DOOR, body).await), "a<|im_start|>b");
}

#[tokio::test]
async fn log_probabilities_have_the_legacy_shape() {
    let server = Server::start(FakeEngine::say("hé")).await;
    let body = json!({"prompt": "a", "max_tokens": 3, "logprobs": 6});
    let list = server.ok(DOOR, body).await["choices"][0]["logprobs"].clone();
    assert_eq!(list["tokens"], json!(["h", "\u{FFFD}", "\u{FFFD}"]));
    assert_eq!(list["token_logprobs"], json!([-0.25, -0.25, -0.25]));
    assert_eq!(list["text_offset"], json!([0, 1, 2]));
    let top = list["top_logprobs"][0].as_object().unwrap();
    assert_eq!(top.keys().collect::<Vec<_>>(), ["h", "i", "j", "k", "l", "m"]);
    assert_eq!(top["l"], -9999.0, "minus infinity is a number");
    let none = server.ok(DOOR, json!({"prompt": "a", "max_tokens": 1, "logprobs": 0})).await;
    assert_eq!(none["choices"][0]["logprobs"]["top_logprobs"], json!([{"h": -0.25}]));
}

#[tokio::test]
async fn echo_and_prompt_log_probabilities_describe_the_prompt() {
    let server = Server::start(FakeEngine::say("xy")).await;
    let body = json!({"prompt": "abc", "max_tokens": 2, "echo": true, "logprobs": 1});
    let choice = server.ok(DOOR, body).await["choices"][0].clone();
    assert_eq!(choice["text"], "abcxy");
    assert_eq!(choice["logprobs"]["tokens"], json!(["a", "b", "c", "x", "y"]));
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -0.25, -0.25, -0.25, -0.25]));
    assert_eq!(choice["logprobs"]["top_logprobs"][0], Value::Null);
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 1, 2, 3, 4]));

    // As evaluation harnesses score a text: nothing is generated.
    let body = json!({"prompt": [97, 98], "max_tokens": 0, "echo": true, "logprobs": 1});
    let reply = server.ok(DOOR, body).await;
    assert_eq!(reply["choices"][0]["logprobs"]["tokens"], json!(["a", "b"]));
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
    assert_eq!(reply["usage"]["completion_tokens"], 0);
    assert_eq!(server.engine.last_request().max_tokens, Tokens::ZERO);
    // Without log-probabilities there is nothing to run at all.
    let before = server.engine.submitted();
    let reply = server.ok(DOOR, json!({"prompt": "ab", "max_tokens": 0, "echo": true})).await;
    assert_eq!(reply["choices"][0]["text"], "ab");
    assert_eq!(server.engine.submitted(), before);

    let body = json!({"prompt": "abcdefg", "prompt_logprobs": 1, "n": 2});
    let reply = server.ok(DOOR, body).await;
    for choice in reply["choices"].as_array().unwrap() {
        let entries = choice["prompt_logprobs"].as_array().unwrap();
        assert_eq!((entries.len(), &entries[0]), (7, &Value::Null));
        let entry = json!({"103": {"logprob": -0.25, "rank": 1, "decoded_token": "g"}});
        assert_eq!(entries[6], entry);
    }
}

/// Puts a stream's chunks together, per choice.
fn assemble(chunks: &[Value], choices: usize) -> Vec<Value> {
    let mut whole = vec![json!({"text": "", "token_ids": [], "tokens": []}); choices];
    for chunk in chunks {
        assert_eq!(chunk["object"], "text_completion");
        for choice in chunk["choices"].as_array().unwrap() {
            let of = &mut whole[choice["index"].as_u64().unwrap() as usize];
            of["text"] =
                format!("{}{}", of["text"].as_str().unwrap(), choice["text"].as_str().unwrap())
                    .into();
            for (list, more) in
                [("token_ids", &choice["token_ids"]), ("tokens", &choice["logprobs"]["tokens"])]
            {
                of[list].as_array_mut().unwrap().extend(more.as_array().unwrap().iter().cloned());
            }
            for once in ["finish_reason", "stop_reason", "prompt_token_ids"] {
                if !choice[once].is_null() {
                    assert!(of[once].is_null(), "{once} comes once");
                    of[once] = choice[once].clone();
                }
            }
        }
    }
    whole
}

#[tokio::test]
async fn streamed_equals_whole() {
    let cases = [
        json!({"prompt": "ab", "max_tokens": 40, "echo": true, "n": 3}),
        json!({"prompt": ["ab", "cd"], "max_tokens": 40, "stop": ["wör", "zz"]}),
        json!({"prompt": "ab", "max_tokens": 9}),
        json!({"prompt": "ab", "max_tokens": 40, "ignore_eos": true}),
        json!({"prompt": "ab", "max_tokens": 0, "echo": true}),
    ];
    for batch in [1, 5] {
        for case in &cases {
            let engine = FakeEngine { batch, ..FakeEngine::say("Héllo wörld 😀 zz") };
            let server = Server::start(engine).await;
            let mut body = case.clone();
            body["return_token_ids"] = true.into();
            body["logprobs"] = 1.into();
            let reply = server.ok(DOOR, body.clone()).await;
            body["stream"] = true.into();
            body["stream_options"] = json!({"include_usage": true});
            let mut chunks = server.stream(DOOR, body).await;
            let last = chunks.pop().unwrap();
            assert_eq!(last["choices"], json!([]));
            assert_eq!(last["usage"], reply["usage"]);
            assert!(chunks.iter().all(|chunk| chunk.get("usage") == Some(&Value::Null)));
            let choices = reply["choices"].as_array().unwrap();
            for (choice, streamed) in choices.iter().zip(assemble(&chunks, choices.len())) {
                assert_eq!(choice["text"], streamed["text"]);
                assert_eq!(choice["token_ids"], streamed["token_ids"]);
                assert_eq!(choice["logprobs"]["tokens"], streamed["tokens"]);
                for field in ["finish_reason", "stop_reason", "prompt_token_ids"] {
                    assert_eq!(choice[field], streamed[field], "{field} of {case}");
                }
            }
        }
    }
}

#[tokio::test]
async fn usage_is_streamed_only_when_asked_for() {
    let server = Server::start(FakeEngine::say("abc")).await;
    let chunks = server.stream(DOOR, json!({"prompt": "a", "stream": true})).await;
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()));
    let options = json!({"continuous_usage_stats": true});
    let body = json!({"prompt": "a", "stream": true, "stream_options": options});
    let chunks = server.stream(DOOR, body).await;
    let counts: Vec<_> = chunks.iter().map(|c| c["usage"]["completion_tokens"].as_u64()).collect();
    assert_eq!(counts.first(), Some(&Some(1)));
    assert_eq!(counts.last(), Some(&Some(4)));
}

#[tokio::test]
async fn a_prompt_may_fill_the_context() {
    let server = Server::start(FakeEngine::say("abc")).await;
    let exact = vec![97; MAX_CONTEXT as usize];
    let reply = server.ok(DOOR, json!({"prompt": exact})).await;
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
    let reply = server.ok(DOOR, json!({"prompt": exact[2..], "max_tokens": 2})).await;
    assert_eq!(reply["choices"][0]["text"], "ab");
}

#[tokio::test]
async fn a_folder_without_tokenizer_serves_ids_and_says_so_of_text() {
    let server = Server::with(FakeEngine::say("ok"), model::bare_folder(), common::limits()).await;
    let body = json!({"prompt": [1, 2], "return_token_ids": true, "logprobs": 1});
    let choice = server.ok(DOOR, body).await["choices"][0].clone();
    assert_eq!((&choice["text"], &choice["token_ids"]), (&json!(""), &json!([111, 107, END])));
    assert_eq!(choice["logprobs"]["tokens"][0], "token_id:111");
    for (door, body, param) in [
        (DOOR, json!({"prompt": "text"}), "prompt"),
        (DOOR, json!({"prompt": [1], "stop": "x"}), "stop"),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": "x"}]}),
            "messages",
        ),
        ("/tokenize", json!({"prompt": "x"}), "prompt"),
    ] {
        let reply = server.post(door, &body.to_string()).await;
        assert_eq!(reply.status, 400, "{door}");
        assert_eq!(reply.json()["error"]["param"], param);
        assert!(reply.text().contains("tokenizer.json"));
    }
}
