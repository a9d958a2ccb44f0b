//! Requests that are wrong: each gets its status, its code and the field at fault, in OpenAI's
//! envelope, and leaves the server as it was.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use common::Server;
use common::client::{self, Reply};
use common::engine::{FakeEngine, MAX_CONTEXT, VOCAB};
use serde_json::{Value, json};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// Status and envelope of a refusal; `param` and `code` as expected.
fn assert_refused(reply: &Reply, status: u16, code: &str, param: Option<&str>, what: &str) {
    assert_eq!(reply.status, status, "{what}: {}", reply.text());
    assert_eq!(reply.header("content-type"), Some("application/json"), "{what}");
    let json = reply.json();
    let error = json["error"].as_object().unwrap_or_else(|| panic!("{what}: {json}"));
    assert_eq!(error.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"], "{what}");
    assert_eq!(error["type"], "invalid_request_error", "{what}");
    assert_eq!(error["code"], code, "{what}: {json}");
    assert_eq!(error["param"], json!(param), "{what}: {json}");
    assert!(!error["message"].as_str().unwrap().is_empty(), "{what}");
    assert!(reply.body.len() < 4_000, "{what}: a refusal is short");
}

/// Nothing above reached the engine, and it still serves.
async fn assert_unharmed(server: &Server) {
    assert_eq!(server.engine.submitted(), 0);
    assert_eq!(server.get("/readyz").await.status, 200);
    server.ok(COMPLETIONS, json!({"prompt": "a"})).await;
}

/// `body` with fields on top, as text; values may be no JSON.
fn with(door: &str, fields: &str) -> String {
    let base = if door == CHAT {
        r#""messages":[{"role":"user","content":"x"}]"#
    } else {
        r#""prompt":"x""#
    };
    format!("{{{base},{fields}}}")
}

#[tokio::test]
async fn bodies_that_are_no_json() {
    let server = Server::start(FakeEngine::say("x")).await;
    let deep = format!("{{\"prompt\":{}", "[".repeat(100_000));
    let deep_object = format!("{{\"x\":{}1{}}}", "{\"a\":".repeat(100_000), "}".repeat(100_000));
    let many = format!(
        "{{{}\"prompt\":\"a\"}}",
        (0..300).map(|i| format!("\"f{i}\":0,")).collect::<String>()
    );
    for door in [COMPLETIONS, CHAT, "/tokenize", "/detokenize"] {
        let cases: [(&[u8], &str); 9] = [
            (b"", "invalid_json"),
            (b"{\"prompt\": \"a", "invalid_json"),
            (b"{\"prompt\": \"a\"} x", "invalid_json"),
            (b"{\"prompt\": NaN}", "invalid_json"),
            (b"{\"prompt\": \"\xFF\"}", "invalid_json"),
            (deep.as_bytes(), "json_too_deep"),
            (deep_object.as_bytes(), "json_too_deep"),
            (b"[1]", "invalid_request"),
            (many.as_bytes(), "invalid_request"),
        ];
        for (body, code) in cases {
            let reply = client::send(server.address, &client::post(door, body, "")).await;
            let shown = String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned();
            assert_refused(&reply, 400, code, None, &format!("{door} {shown}"));
        }
    }
    let reply = server.post(COMPLETIONS, "{\"prompt\": \"a\", }").await;
    assert!(reply.text().contains("(byte 16)"), "{}", reply.text());
    assert_unharmed(&server).await;
}

#[tokio::test]
async fn bodies_of_wrong_type_or_size() {
    let server = Server::start(FakeEngine::say("x")).await;
    let send = async |head: &str, body: &[u8]| {
        let mut raw =
            format!("POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{head}\r\n")
                .into_bytes();
        raw.extend_from_slice(body);
        client::send(server.address, &raw).await
    };
    let unsupported = "unsupported_media_type";
    let json = "Content-Type: application/json\r\n";
    for head in [
        "Content-Type: text/plain\r\nContent-Length: 2\r\n".to_owned(),
        "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 2\r\n".to_owned(),
        "Content-Length: 2\r\n".to_owned(),
        format!("{json}Content-Encoding: gzip\r\nContent-Length: 2\r\n"),
        format!("{json}Content-Encoding: br\r\nContent-Length: 2\r\n"),
        format!("{json}Content-Encoding: identity, deflate\r\nContent-Length: 2\r\n"),
    ] {
        assert_refused(&send(&head, b"{}").await, 415, unsupported, None, &head);
    }
    // Announced too large: refused before a byte of it is read.
    let reply = send(&format!("{json}Content-Length: 1048577\r\n"), b"").await;
    assert_refused(&reply, 413, "body_too_large", None, "announced");
    // Not announced: refused as soon as the limit is passed, here while the client goes on.
    let mut chunked = Vec::new();
    for _ in 0..40 {
        chunked.extend_from_slice(b"10000\r\n");
        chunked.extend_from_slice(&[b' '; 0x10000]);
        chunked.extend_from_slice(b"\r\n");
    }
    let reply = send(&format!("{json}Transfer-Encoding: chunked\r\n"), &chunked).await;
    assert_refused(&reply, 413, "body_too_large", None, "chunked");
    // Parameters of the type are fine, and so is a chunked body within the limit.
    let reply = send(
        "Content-Type: application/json; charset=utf-8\r\nTransfer-Encoding: chunked\r\n",
        b"e\r\n{\"prompt\":\"a\"}\r\n0\r\n\r\n",
    )
    .await;
    assert_eq!(reply.status, 200, "{}", reply.text());
}

#[tokio::test]
async fn models_that_are_not_served() {
    let server = Server::start(FakeEngine::say("x")).await;
    for door in [COMPLETIONS, CHAT, "/tokenize", "/detokenize"] {
        for name in ["other", "", "TINY"] {
            let body = with(door, &format!("\"model\":\"{name}\""));
            let reply = server.post(door, &body).await;
            assert_refused(&reply, 404, "model_not_found", Some("model"), door);
        }
        let reply = server.post(door, &with(door, "\"model\":7")).await;
        assert_refused(&reply, 400, "invalid_value", Some("model"), door);
    }
    assert_unharmed(&server).await;
}

#[tokio::test]
async fn prompts_and_messages() {
    let server = Server::start(FakeEngine::say("x")).await;
    let vocab = VOCAB.to_string();
    for prompt in [
        "\"\"",
        "[]",
        "[[]]",
        "[\"\"]",
        "[[1],[]]",
        "null",
        "7",
        "true",
        "{}",
        "[1,\"a\"]",
        "[\"a\",1]",
        &format!("[{vocab}]"),
        "[-1]",
        "[9223372036854775808]",
        "[1.5]",
        "[[1,[2]]]",
        "\"\\ud800\"",
        "\"\\udc00x\"",
        "\"\\uD83Dx\"",
    ] {
        let reply = server.post(COMPLETIONS, &format!("{{\"prompt\":{prompt}}}")).await;
        assert_refused(&reply, 400, "invalid_value", Some("prompt"), prompt);
    }
    assert_refused(
        &server.post(COMPLETIONS, "{}").await,
        400,
        "invalid_value",
        Some("prompt"),
        "-",
    );
    for messages in ["[]", "null", "\"hi\"", "{}", "7"] {
        let reply = server.post(CHAT, &format!("{{\"messages\":{messages}}}")).await;
        assert_refused(&reply, 400, "invalid_value", Some("messages"), messages);
    }
    assert_refused(&server.post(CHAT, "{}").await, 400, "invalid_value", Some("messages"), "-");
    let cases = [
        ("7", "invalid_value", "messages[0]"),
        ("{}", "invalid_value", "messages[0].role"),
        (r#"{"role":"wizard","content":"x"}"#, "invalid_value", "messages[0].role"),
        (r#"{"role":"tool","content":"x"}"#, "unsupported_parameter", "messages[0].role"),
        (r#"{"role":"user"}"#, "invalid_value", "messages[0].content"),
        (r#"{"role":"user","content":7}"#, "invalid_value", "messages[0].content"),
        (r#"{"role":"user","content":"\ud800"}"#, "invalid_value", "messages[0].content"),
        (
            r#"{"role":"user","content":[{"type":"image_url","image_url":{"url":"http://127.0.0.1"}}]}"#,
            "unsupported_parameter",
            "messages[0].content[0]",
        ),
        (
            r#"{"role":"user","content":[{"type":"text"}]}"#,
            "invalid_value",
            "messages[0].content[0].text",
        ),
        (
            r#"{"role":"assistant","tool_calls":[{"id":"x"}]}"#,
            "unsupported_parameter",
            "messages[0].tool_calls",
        ),
    ];
    for (message, code, param) in cases {
        let reply = server.post(CHAT, &format!("{{\"messages\":[{message}]}}")).await;
        assert_refused(&reply, 400, code, Some(param), message);
    }
    assert_unharmed(&server).await;
}

#[tokio::test]
async fn contexts_that_are_too_long() {
    let server = Server::start(FakeEngine::say("x")).await;
    let max = MAX_CONTEXT as usize;
    for (length, extra) in
        [(max + 1, ""), (10 * max, ""), (max, ",\"max_tokens\":1"), (max - 1, ",\"max_tokens\":2")]
    {
        let prompts = [
            serde_json::to_string(&vec![1; length]).unwrap(),
            format!("\"{}\"", "a".repeat(length)),
        ];
        for prompt in prompts {
            let reply = server.post(COMPLETIONS, &format!("{{\"prompt\":{prompt}{extra}}}")).await;
            assert_refused(&reply, 400, "context_length_exceeded", Some("prompt"), extra);
            let text = reply.text();
            assert!(text.contains("maximum context length is 256 tokens"), "{text}");
            if extra.is_empty() && prompt.starts_with('[') {
                assert!(text.contains(&format!("{length} tokens in the prompt")), "{text}");
            }
        }
    }
    let long =
        format!("{{\"messages\":[{{\"role\":\"user\",\"content\":\"{}\"}}]}}", "a".repeat(max));
    let reply = server.post(CHAT, &long).await;
    assert_refused(&reply, 400, "context_length_exceeded", Some("messages"), "chat");
    assert_unharmed(&server).await;
}

#[tokio::test]
async fn fields_out_of_range_on_every_door() {
    let server = Server::start(FakeEngine::say("x")).await;
    let big_map: Value =
        (0..1_025).map(|i| (i.to_string(), json!(1))).collect::<serde_json::Map<_, _>>().into();
    let huge_map: Value =
        (0..60_000).map(|i| (i.to_string(), json!(1))).collect::<serde_json::Map<_, _>>().into();
    let long_stop = "s".repeat(1_000_000);
    let cases: &[(&str, &[&str])] = &[
        ("max_tokens", &["0", "-1", "1099511627776", "1e400", "1.5", "\"7\"", "true", "[]"]),
        ("min_tokens", &["-1", "1000000000000", "257", "0.5"]),
        ("n", &["0", "-1", "129", "1000000000", "1.5", "\"2\""]),
        ("temperature", &["-1", "1e9", "2.1", "1e400", "-1e400", "\"hot\"", "[]"]),
        ("top_p", &["0", "1.1", "-0.5"]),
        ("top_k", &["-2", "4294967296", "1.5"]),
        ("min_p", &["2", "-0.1"]),
        ("presence_penalty", &["10", "-10", "1e39"]),
        ("frequency_penalty", &["10", "-10"]),
        ("repetition_penalty", &["0", "-10", "11"]),
        ("seed", &["18446744073709551616", "1.5", "\"7\"", "9223372036854775808"]),
        (
            "stop",
            &["[\"1\",\"2\",\"3\",\"4\",\"5\"]", "\"\"", "[\"a\",\"\"]", "7", "[7]", "\"\\ud800\""],
        ),
        ("stop_token_ids", &["[300]", "[-1]", "\"x\"", "7"]),
        (
            "logit_bias",
            &["{\"300\":1}", "{\"x\":1}", "{\"-1\":1}", "{\"1\":1e9}", "{\"1\":-101}", "[]"],
        ),
        ("stream", &["\"yes\"", "1"]),
        ("stream_options", &["{\"include_usage\":true}", "{}"]),
        ("prompt_logprobs", &["21", "-1", "true"]),
        ("priority", &["2147483648", "0.5"]),
        ("user", &["7", "[\"u\"]"]),
        ("cache_salt", &["\"\"", "\"a/b\"", "\"a\\u0000\"", "7"]),
        ("ignore_eos", &["1"]),
        ("skip_special_tokens", &["\"no\""]),
    ];
    for door in [COMPLETIONS, CHAT] {
        for (param, values) in cases {
            for value in *values {
                let reply = server.post(door, &with(door, &format!("\"{param}\":{value}"))).await;
                // Zero is refused under the name that the door prefers.
                let named = match (*param, *value, door) {
                    ("max_tokens", "0", CHAT) => "max_completion_tokens",
                    _ => param,
                };
                assert_refused(
                    &reply,
                    400,
                    "invalid_value",
                    Some(named),
                    &format!("{door} {param}={value}"),
                );
            }
        }
        for (param, value) in [
            ("logit_bias", big_map.to_string()),
            ("logit_bias", huge_map.to_string()),
            ("stop", format!("\"{long_stop}\"")),
            ("cache_salt", format!("\"{}\"", "s".repeat(129))),
        ] {
            let reply = server.post(door, &with(door, &format!("\"{param}\":{value}"))).await;
            assert_refused(&reply, 400, "invalid_value", Some(param), &format!("{door} {param}"));
        }
        // Also against a max_tokens that nobody gave.
        for fields in
            ["\"min_tokens\":9,\"max_tokens\":8", "\"min_tokens\":256,\"max_tokens\":null"]
        {
            let reply = server.post(door, &with(door, fields)).await;
            assert_refused(&reply, 400, "invalid_value", Some("min_tokens"), fields);
        }
        let reply = server.post(door, &with(door, "\"stream\":true,\"prompt_logprobs\":1")).await;
        assert_refused(&reply, 400, "invalid_value", Some("prompt_logprobs"), door);
        // The message names the range, and what came.
        for (param, value, words) in [
            ("temperature", "3", "between 0 and 2, got 3"),
            ("temperature", "-1", "between 0 and 2, got -1"),
            ("top_p", "1.1", "above 0 and at most 1, got 1.1"),
            ("min_p", "2", "between 0 and 1, got 2"),
            ("presence_penalty", "10", "between -2 and 2, got 10"),
            ("frequency_penalty", "-10", "between -2 and 2, got -10"),
            ("repetition_penalty", "-10", "above 0 and at most 10, got -10"),
            ("n", "129", "an integer between 1 and 128, got 129"),
        ] {
            let reply = server.post(door, &with(door, &format!("\"{param}\":{value}"))).await;
            let expected = format!("{param} must be {words}");
            assert!(reply.text().contains(&expected), "{expected}: {}", reply.text());
        }
        // What JSON has no word for.
        for param in ["max_tokens", "temperature", "top_p", "seed", "n", "logit_bias"] {
            for value in ["NaN", "Infinity", "-Infinity", "+1", "0x10", "01"] {
                let reply = server.post(door, &with(door, &format!("\"{param}\":{value}"))).await;
                assert_refused(&reply, 400, "invalid_json", None, &format!("{param}={value}"));
            }
        }
    }
    let reply = server.post(COMPLETIONS, &with(COMPLETIONS, "\"n\":2,\"best_of\":1")).await;
    assert_refused(&reply, 400, "unsupported_parameter", Some("best_of"), "best_of < n");
    let own = [
        (COMPLETIONS, "logprobs", "21", "invalid_value"),
        (COMPLETIONS, "logprobs", "-1", "invalid_value"),
        (COMPLETIONS, "logprobs", "true", "invalid_value"),
        (COMPLETIONS, "best_of", "2", "unsupported_parameter"),
        (COMPLETIONS, "best_of", "0", "invalid_value"),
        (COMPLETIONS, "suffix", "\"x\"", "unsupported_parameter"),
        (CHAT, "logprobs", "5", "invalid_value"),
        (CHAT, "top_logprobs", "21", "invalid_value"),
        (CHAT, "top_logprobs", "-1", "invalid_value"),
        (CHAT, "top_logprobs", "2", "invalid_value"),
        (CHAT, "max_completion_tokens", "-1", "invalid_value"),
        (CHAT, "chat_template_kwargs", "7", "invalid_value"),
        (CHAT, "chat_template_kwargs", "{\"messages\":[]}", "invalid_value"),
    ];
    for (door, param, value, code) in own {
        let reply = server.post(door, &with(door, &format!("\"{param}\":{value}"))).await;
        assert_refused(&reply, 400, code, Some(param), &format!("{door} {param}={value}"));
    }
    assert_unharmed(&server).await;
}

#[tokio::test]
async fn fields_whose_loss_would_change_the_result() {
    let server = Server::start(FakeEngine::say("x")).await;
    for (param, value) in [
        ("tools", "[{\"type\":\"function\"}]"),
        ("tool_choice", "\"required\""),
        ("response_format", "{\"type\":\"json_object\"}"),
        ("guided_json", "{}"),
        ("guided_regex", "\"a+\""),
        ("structured_outputs", "{\"choice\":[\"a\"]}"),
        ("use_beam_search", "true"),
        // Templates are code: none is taken from a request, whatever it would do.
        ("chat_template", "\"{% for i in range(10**9) %}{{ 'a' * 10**9 }}{% endfor %}\""),
        ("chat_template", "\"{{ ''.__class__.__mro__[1].__subclasses__() }}\""),
        ("chat_template", "\"{{ messages[0].content }}\""),
        ("chat_template", "\"\""),
    ] {
        for door in [COMPLETIONS, CHAT] {
            let reply = server.post(door, &with(door, &format!("\"{param}\":{value}"))).await;
            assert_refused(&reply, 400, "unsupported_parameter", Some(param), param);
        }
    }
    assert_unharmed(&server).await;
}

#[tokio::test]
async fn fields_without_effect_are_taken_and_unknown_ones_counted() {
    let server = Server::start(FakeEngine::say("x")).await;
    let fields = "\"user\":\"u\",\"metadata\":{},\"store\":false,\"service_tier\":\"auto\",\"tools\":[],\
                  \"response_format\":{\"type\":\"text\"},\"no_such\":1,\"nor_this\":{\"a\":[]}";
    for (door, label) in
        [(COMPLETIONS, telemetry::Door::Completions), (CHAT, telemetry::Door::Chat)]
    {
        assert_eq!(server.post(door, &with(door, fields)).await.status, 200);
        assert_eq!(server.metrics.unknown_fields(label).get(), 2);
        // Of equal keys the last wins.
        let reply = server.post(door, &with(door, "\"n\":0,\"n\":2")).await;
        assert_eq!(reply.json()["choices"].as_array().unwrap().len(), 2);
    }
    for (door, label, field, first, last) in [
        ("/tokenize", telemetry::Door::Tokenize, "prompt", "\"\"", "\"ab\""),
        ("/detokenize", telemetry::Door::Detokenize, "tokens", "[]", "[97,98]"),
    ] {
        let body =
            format!("{{\"{field}\":{first},\"no_such\":1,\"{field}\":{last},\"nor_this\":2}}");
        let reply = server.post(door, &body).await;
        let expected = if door == "/tokenize" { "\"tokens\":[97,98]" } else { "\"prompt\":\"ab\"" };
        assert!(reply.status == 200 && reply.text().contains(expected), "{}", reply.text());
        assert_eq!(server.metrics.unknown_fields(label).get(), 2);
    }
}

#[tokio::test]
async fn replies_that_would_be_too_large() {
    let server = Server::start(FakeEngine::say("x")).await;
    let prompt = vec![1; 200];
    let prompts: Vec<_> = (0..8).map(|_| prompt.clone()).collect();
    let body = json!({"prompt": prompts, "n": 128, "prompt_logprobs": 20, "max_tokens": 1});
    let reply = server.post(COMPLETIONS, &body.to_string()).await;
    assert_refused(&reply, 400, "invalid_value", Some("prompt_logprobs"), "prompt_logprobs");
    let body = json!({"prompt": vec![[1]; 9], "n": 128});
    let reply = server.post(COMPLETIONS, &body.to_string()).await;
    assert_refused(&reply, 400, "invalid_value", Some("n"), "choices");
    let body = json!({"prompt": vec![[1]; 2_000]});
    let reply = server.post(COMPLETIONS, &body.to_string()).await;
    assert_refused(&reply, 400, "invalid_value", Some("prompt"), "prompts");
    assert_unharmed(&server).await;
}

#[tokio::test]
async fn a_template_that_refuses_speaks_for_itself() {
    let template = "{% if messages[0].role != 'user' %}{{ raise_exception('start with user') }}\
                    {% endif %}{% for i in range(loops | default(1)) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}";
    let config = json!({ "chat_template": template });
    let folder = text::TextFolder::from_files(|name| {
        Ok(match name {
            "tokenizer.json" => Some(common::model::tokenizer_json().into_bytes()),
            "tokenizer_config.json" => Some(config.to_string().into_bytes()),
            _ => None,
        })
    })
    .unwrap();
    let server = Server::with(FakeEngine::say("x"), folder, common::limits()).await;
    let reply = server.post(CHAT, r#"{"messages":[{"role":"system","content":"x"}]}"#).await;
    assert_refused(&reply, 400, "invalid_value", Some("messages"), "raise_exception");
    assert!(reply.text().contains("start with user"));
    let body = with(CHAT, "\"chat_template_kwargs\":{\"loops\":9999}");
    let started = std::time::Instant::now();
    let reply = server.post(CHAT, &body).await;
    assert_refused(&reply, 400, "invalid_value", Some("messages"), "fuel");
    assert!(started.elapsed() < std::time::Duration::from_secs(2), "fuel bounds the time");
}
