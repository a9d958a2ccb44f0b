//! Tokenizers built on the spot, held against the `tokenizers` library itself.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use ids::TokenId;
use proptest::prelude::*;
use serde_json::json;
use std::sync::{Arc, LazyLock};
use text::{Detokenizer, Start, Tokenizer};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, NormalizerWrapper, TokenizerImpl};

/// A byte-level BPE trained on a few words, and the library's own view of it.
static BYTE_LEVEL: LazyLock<(tokenizers::Tokenizer, Arc<Tokenizer>)> = LazyLock::new(|| {
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(400)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from("<｜end▁of▁text｜>", true)])
        .build();
    let level = ByteLevel::new(false, true, true);
    let mut tokenizer: TokenizerImpl<BPE, NormalizerWrapper, ByteLevel, ByteLevel, ByteLevel> =
        TokenizerImpl::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(level)).with_decoder(Some(level));
    let words =
        ["the quick brown fox", "größe naïve café", "中文字符 日本語", "😀😀 👩‍👩‍👧‍👦", "a  b\n\nc\t"];
    tokenizer.train(&mut trainer, words.iter().cycle().take(200)).unwrap();
    let file = tokenizer.to_string(false).unwrap();
    let ours = Tokenizer::from_bytes(file.as_bytes(), None).unwrap();
    (tokenizers::Tokenizer::from_bytes(file.as_bytes()).unwrap(), Arc::new(ours))
});

/// SentencePiece style with byte fallback, as Llama 2 and its kin have it.
static SENTENCEPIECE: LazyLock<(tokenizers::Tokenizer, Arc<Tokenizer>)> = LazyLock::new(|| {
    let mut vocab = serde_json::Map::new();
    let mut add = |token: String| {
        let id = vocab.len();
        vocab.insert(token, json!(id));
    };
    ["<unk>", "<s>", "</s>"].into_iter().for_each(|token| add(token.to_owned()));
    (0..256).for_each(|byte| add(format!("<0x{byte:02X}>")));
    "▁abcdeé".chars().for_each(|c| add(c.to_string()));
    ["▁a", "▁▁", "ab"].into_iter().for_each(|token| add(token.to_owned()));
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "special": true, "single_word": false,
               "lstrip": false, "rstrip": false, "normalized": false})
    };
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>",
                  "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
                  "byte_fallback": true, "vocab": vocab,
                  "merges": [["▁", "a"], ["▁", "▁"], ["a", "b"]]}
    })
    .to_string();
    let ours = Tokenizer::from_bytes(file.as_bytes(), None).unwrap();
    (tokenizers::Tokenizer::from_bytes(file.as_bytes()).unwrap(), Arc::new(ours))
});

/// The pieces that single tokens complete.
fn pieces(tokenizer: &Arc<Tokenizer>, tokens: &[u32], start: Start, skip: bool) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), start, skip);
    let mut pieces = Vec::new();
    for token in tokens {
        let mut piece = String::new();
        detokenizer.push(TokenId(*token), &mut piece);
        pieces.push(piece);
    }
    let mut rest = String::new();
    detokenizer.finish(&mut rest);
    pieces.push(rest);
    pieces
}

proptest! {
    #[test]
    fn any_byte_level_tokens_decode_as_in_the_library(
        seeds in prop::collection::vec(any::<u32>(), 0..40),
        skip: bool,
    ) {
        let (library, ours) = &*BYTE_LEVEL;
        let tokens: Vec<u32> = seeds.iter().map(|seed| seed % ours.len() as u32).collect();
        let whole = library.decode(&tokens, skip).unwrap();
        prop_assert_eq!(pieces(ours, &tokens, Start::Text, skip).concat(), whole);
    }

    #[test]
    fn text_survives_both_kinds_of_tokenizer(text in "[a-e éß中😀\u{301}\n]{0,30}") {
        for (library, ours) in [&*BYTE_LEVEL, &*SENTENCEPIECE] {
            let tokens: Vec<u32> = ours.encode(&text, false).unwrap().iter().map(|t| t.0).collect();
            let expected = library.encode(text.as_str(), false).unwrap();
            prop_assert_eq!(&tokens[..], expected.get_ids());
            let whole = pieces(ours, &tokens, Start::Text, true).concat();
            prop_assert_eq!(&whole, &text);
            prop_assert_eq!(whole, library.decode(&tokens, true).unwrap());
        }
    }
}

#[test]
fn a_character_comes_with_its_last_token() {
    let (_, ours) = &*SENTENCEPIECE;
    let tokens: Vec<u32> = ours.encode("a😀", false).unwrap().iter().map(|t| t.0).collect();
    assert_eq!(pieces(ours, &tokens, Start::Text, true), ["a", "", "", "", "😀", ""]);
    // A character that is never completed ends as one U+FFFD, also in the middle.
    let broken = [&tokens[..3], &tokens[..1]].concat();
    assert_eq!(pieces(ours, &broken, Start::Text, true).concat(), "a\u{FFFD} a");
    assert_eq!(pieces(ours, &tokens[..3], Start::Text, true).concat(), "a\u{FFFD}");
}

#[test]
fn the_space_before_an_answer_is_part_of_it() {
    let (_, ours) = &*SENTENCEPIECE;
    let tokens: Vec<u32> = ours.encode("a b", false).unwrap().iter().map(|t| t.0).collect();
    assert_eq!(pieces(ours, &tokens, Start::Text, true).concat(), "a b");
    assert_eq!(pieces(ours, &tokens, Start::Continuation, true).concat(), " a b");
}

#[test]
fn the_config_outranks_the_post_processor() {
    let (library, _) = &*SENTENCEPIECE;
    let file = library.to_string(false).unwrap();
    let encode = |config: serde_json::Value| {
        let tokenizer =
            Tokenizer::from_bytes(file.as_bytes(), Some(config.to_string().as_bytes())).unwrap();
        let tokens = tokenizer.encode("b", true).unwrap();
        tokens.iter().map(|t| tokenizer.token_name(*t).unwrap()).collect::<String>()
    };
    assert_eq!(encode(json!({})), "<s>▁b");
    assert_eq!(encode(json!({"add_bos_token": false, "bos_token": "<s>"})), "▁b");
    assert_eq!(encode(json!({"add_bos_token": true, "bos_token": {"content": "<s>"}})), "<s>▁b");
    let both = json!({"add_eos_token": true, "eos_token": "</s>"});
    assert_eq!(encode(both), "<s>▁b</s>");
    let missing = json!({"add_bos_token": true, "bos_token": "<none>"}).to_string();
    let error = Tokenizer::from_bytes(file.as_bytes(), Some(missing.as_bytes())).unwrap_err();
    assert!(error.to_string().contains("<none>"));
}
