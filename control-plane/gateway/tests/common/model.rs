//! A model folder whose token `b` is the byte `b`, with three control tokens after them.

use serde_json::json;
use text::TextFolder;

pub(crate) const START: u32 = 256;
pub(crate) const END: u32 = 257;
pub(crate) const THINK: u32 = 258;

pub(crate) const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n\
    {{ message.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% if thinking %}<think>{% endif %}{% endif %}";

/// The byte-level alphabet: printable characters stand for themselves.
fn byte_chars() -> Vec<char> {
    let plain = |b: u32| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 0x100;
    (0..256)
        .map(|b| {
            if plain(b) {
                return char::from_u32(b).unwrap();
            }
            next += 1;
            char::from_u32(next - 1).unwrap()
        })
        .collect()
}

pub(crate) fn tokenizer_json() -> String {
    let vocab: serde_json::Map<_, _> =
        byte_chars().iter().zip(0..).map(|(c, id)| (c.to_string(), json!(id))).collect();
    let control = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "special": special, "single_word": false,
               "lstrip": false, "rstrip": false, "normalized": false})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [
            control(START, "<|im_start|>", true), control(END, "<|im_end|>", true),
            control(THINK, "<think>", false)],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false,
                          "trim_offsets": true, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false,
                    "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    })
    .to_string()
}

/// With tokenizer and chat template.
pub(crate) fn folder() -> TextFolder {
    folder_with(json!({ "eos_token_id": END }))
}

pub(crate) fn folder_with(generation: serde_json::Value) -> TextFolder {
    let config = json!({ "eos_token": "<|im_end|>", "chat_template": TEMPLATE });
    TextFolder::from_files(|name| {
        Ok(match name {
            "tokenizer.json" => Some(tokenizer_json().into_bytes()),
            "tokenizer_config.json" => Some(config.to_string().into_bytes()),
            "generation_config.json" => Some(generation.to_string().into_bytes()),
            _ => None,
        })
    })
    .unwrap()
}

/// Weights alone.
pub(crate) fn bare_folder() -> TextFolder {
    TextFolder::from_files(|name| {
        Ok((name == "config.json").then(|| json!({ "eos_token_id": END }).to_string().into_bytes()))
    })
    .unwrap()
}
