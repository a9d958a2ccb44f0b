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

/// The same with the stages of published byte-level tokenizers: NFC, words by a regular expression
/// (Qwen2's), and merges, here of the combining acute accent with itself.
pub(crate) fn folder_with_words() -> TextFolder {
    const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let mut tokenizer: serde_json::Value = serde_json::from_str(&tokenizer_json()).unwrap();
    tokenizer["normalizer"] = json!({"type": "NFC"});
    let words = json!({"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated",
                       "invert": false});
    let bytes = tokenizer["pre_tokenizer"].take();
    tokenizer["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [words, bytes]});
    let chars = byte_chars();
    let (first, second) = (chars[0xCC].to_string(), chars[0x81].to_string());
    let accent = format!("{first}{second}");
    // Added tokens keep their ids where the vocabulary has them too, and else come behind it.
    let vocab = &mut tokenizer["model"]["vocab"];
    for (content, id) in [("<|im_start|>", START), ("<|im_end|>", END), ("<think>", THINK)] {
        vocab[content] = json!(id);
    }
    vocab[&accent] = json!(THINK + 1);
    vocab[format!("{accent}{accent}")] = json!(THINK + 2);
    tokenizer["model"]["merges"] = json!([[first, second], [accent, accent]]);
    folder_from(&tokenizer.to_string(), json!({ "eos_token_id": END }))
}

pub(crate) fn folder_with(generation: serde_json::Value) -> TextFolder {
    folder_from(&tokenizer_json(), generation)
}

fn folder_from(tokenizer: &str, generation: serde_json::Value) -> TextFolder {
    let config = json!({ "eos_token": "<|im_end|>", "chat_template": TEMPLATE });
    TextFolder::from_files(|name| {
        Ok(match name {
            "tokenizer.json" => Some(tokenizer.as_bytes().to_vec()),
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
