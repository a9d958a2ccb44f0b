//! Keeps text inside chat messages from becoming control tokens.
//!
//! A chat is rendered to one string before it is encoded, and in that string `<|im_end|>` typed by
//! a user looks like the template's own. So before rendering, a *mark* (a Unicode noncharacter
//! found nowhere in the request) is put inside every control token that a message spells, and at
//! the edge of a message that holds only a part of one, which another message or the template could
//! complete. After rendering, the string is cut at the control tokens that are still whole, which
//! are the template's; the marks are taken out of what lies between, and that is encoded by a
//! tokenizer to which control tokens are text. A chat without such text, which is nearly every
//! chat, carries no mark and is encoded in one piece, exactly as transformers does.
//!
//! Invariants: templates see messages unchanged unless they spell control tokens; no mark reaches
//! the tokenizer; a control token in the result begins in the template's text.

use aho_corasick::{AhoCorasick, MatchKind};
use ids::TokenId;
use std::borrow::Cow;
use tokenizers::AddedToken;

/// Noncharacters that Unicode reserves for internal use; text for interchange holds none of them.
const MARKS: std::ops::RangeInclusive<char> = '\u{FDD0}'..='\u{FDEF}';

/// A rendered chat, ready to encode.
#[derive(Clone, Debug)]
pub struct Rendered {
    text: String,
    mark: Option<char>,
}

impl Rendered {
    pub(crate) fn new(text: String, mark: Option<char>) -> Self {
        Self { text, mark }
    }

    /// The text as encoded, with marks where there are any.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    pub(crate) fn mark(&self) -> Option<char> {
        self.mark
    }

    /// The text as a reader would see it.
    #[must_use]
    pub fn to_plain_text(&self) -> String {
        match self.mark {
            None => self.text.clone(),
            Some(mark) => self.text.replace(mark, ""),
        }
    }
}

/// Tokens that steer the model: special ones and those spelled like marks.
#[derive(Debug)]
pub(crate) struct ControlTokens {
    tokens: Vec<(TokenId, AddedToken)>,
    finder: AhoCorasick,
    longest: usize,
}

impl ControlTokens {
    pub(crate) fn new(mut tokens: Vec<(TokenId, AddedToken)>) -> Self {
        tokens.retain(|(_, token)| !token.content.is_empty());
        tokens.sort_unstable_by_key(|(id, _)| *id);
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(tokens.iter().map(|(_, token)| &token.content))
            .expect("an automaton over a vocabulary's added tokens fits 32-bit states");
        let longest = tokens.iter().map(|(_, token)| token.content.len()).max().unwrap_or(0);
        Self { tokens, finder, longest }
    }

    pub(crate) fn tokens(&self) -> impl Iterator<Item = &AddedToken> {
        self.tokens.iter().map(|(_, token)| token)
    }

    /// Cuts `text` into pieces of text, each with the control token that follows it.
    pub(crate) fn split<'a>(
        &'a self,
        text: &'a str,
    ) -> impl Iterator<Item = (&'a str, Option<TokenId>)> {
        let mut from = 0;
        let mut matches = self.finder.find_iter(text);
        let mut done = false;
        std::iter::from_fn(move || {
            if done {
                return None;
            }
            let Some(found) = matches.next() else {
                done = true;
                return Some((&text[from..], None));
            };
            let (id, token) = &self.tokens[found.pattern().as_usize()];
            // `rstrip` of the token before may already have taken spaces that lead here.
            let mut piece = &text[from.min(found.start())..found.start()];
            if token.lstrip {
                piece = piece.trim_end();
            }
            from = found.end();
            if token.rstrip {
                from = text.len() - text[from..].trim_start().len();
            }
            Some((piece, Some(*id)))
        })
    }

    /// Where `text` needs marks: byte offsets in rising order. Tokens in `except` are left alone.
    fn breaks(&self, text: &str, except: &[&str]) -> Vec<usize> {
        let mut offsets = Vec::new();
        for found in self.overlapping(text) {
            let token = &text[found.clone()];
            if !except.contains(&token) {
                let first = token.chars().next().map_or(0, char::len_utf8);
                offsets.push(found.start + first);
            }
        }
        if self.begins(text) {
            offsets.push(text.len());
        }
        offsets
    }

    /// Ranges of control tokens in `text`, also of those that begin inside of another: breaking one
    /// must not uncover the next.
    fn overlapping<'a>(&'a self, text: &'a str) -> impl Iterator<Item = std::ops::Range<usize>> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let found = self.finder.find(aho_corasick::Input::new(text).range(from..))?;
            let first = text[found.start()..].chars().next().map_or(1, char::len_utf8);
            from = found.start() + first;
            Some(found.range())
        })
    }

    /// Whether the end of `text` is a beginning of a control token.
    fn begins(&self, text: &str) -> bool {
        let tail = text.len().saturating_sub(self.longest);
        let tail = text.as_bytes().get(tail..).unwrap_or_default();
        self.tokens().any(|token| {
            let token = token.content.as_bytes();
            tail.contains(&token[0])
                && (1..token.len()).rev().any(|cut| tail.ends_with(&token[..cut]))
        })
    }
}

/// The messages' text cannot be told from the template's: it uses every mark there is.
#[derive(Debug)]
pub(crate) struct NoMarkLeft;

/// Marks the strings of one chat.
pub(crate) struct Protector<'a> {
    control: &'a ControlTokens,
    mark: char,
    used: bool,
}

impl<'a> Protector<'a> {
    /// Chooses a mark that none of `texts` holds.
    pub(crate) fn new<'t>(
        control: &'a ControlTokens,
        texts: impl Iterator<Item = &'t str>,
    ) -> Result<Self, NoMarkLeft> {
        let mut taken = 0_u32;
        for text in texts {
            for c in text.chars().filter(|c| MARKS.contains(c)) {
                taken |= 1 << (u32::from(c) - u32::from(*MARKS.start()));
            }
        }
        let index = taken.trailing_ones();
        let mark = char::from_u32(u32::from(*MARKS.start()) + index)
            .filter(|mark| MARKS.contains(mark))
            .ok_or(NoMarkLeft)?;
        Ok(Self { control, mark, used: false })
    }

    /// `text` as it goes into the template. Control tokens in `except` are left whole.
    pub(crate) fn protect<'t>(&mut self, text: &'t str, except: &[&str]) -> Cow<'t, str> {
        let breaks = self.control.breaks(text, except);
        if breaks.is_empty() {
            return Cow::Borrowed(text);
        }
        self.used = true;
        let mut marked = String::with_capacity(text.len() + breaks.len() * self.mark.len_utf8());
        let mut from = 0;
        for at in breaks {
            marked.push_str(&text[from..at]);
            marked.push(self.mark);
            from = at;
        }
        marked.push_str(&text[from..]);
        Cow::Owned(marked)
    }

    /// The mark, if any text needed it.
    pub(crate) fn mark(&self) -> Option<char> {
        self.used.then_some(self.mark)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control(tokens: &[&str]) -> ControlTokens {
        let tokens = tokens.iter().zip(100..);
        ControlTokens::new(
            tokens.map(|(t, id)| (TokenId(id), AddedToken::from(*t, true))).collect(),
        )
    }

    fn protect(control: &ControlTokens, texts: &[&str]) -> (Vec<String>, Option<char>) {
        let mut protector = Protector::new(control, texts.iter().copied()).expect("a free mark");
        let marked = texts.iter().map(|t| protector.protect(t, &[]).into_owned()).collect();
        (marked, protector.mark())
    }

    #[test]
    fn ordinary_text_carries_no_mark() {
        let control = control(&["<|im_start|>", "<|im_end|>"]);
        let texts = ["Hello, 1 < 2 and 3 > 2.", "naïve", "", "He said <b>no</b> twice"];
        assert_eq!(protect(&control, &texts).1, None);
    }

    #[test]
    fn no_way_of_joining_protected_texts_makes_a_control_token() {
        let control = control(&["<|im_start|>", "<|im_end|>", "<think>", "<<|im_end|>>"]);
        let whole = "a<|im_start|>b<<|im_end|>><think>";
        let bounds: Vec<usize> = (0..=whole.len()).collect();
        for &first in &bounds {
            for &second in bounds.iter().filter(|b| **b >= first) {
                let parts = [&whole[..first], &whole[first..second], &whole[second..]];
                let (marked, mark) = protect(&control, &parts);
                let joined = marked.concat();
                let found: Vec<_> = control.split(&joined).filter_map(|(_, id)| id).collect();
                assert_eq!(found, [], "{parts:?}");
                assert_eq!(joined.replace(mark.expect("marked"), ""), whole);
            }
        }
    }

    #[test]
    fn a_mark_in_the_text_is_not_chosen_and_survives() {
        let control = control(&["<s>"]);
        let (marked, mark) = protect(&control, &["\u{FDD0}<s>"]);
        assert_eq!(mark, Some('\u{FDD1}'));
        assert_eq!(marked[0], "\u{FDD0}<\u{FDD1}s>");
        let all: String = MARKS.collect();
        assert!(Protector::new(&control, [all.as_str()].into_iter()).is_err());
    }

    #[test]
    fn a_cut_keeps_stripping_tokens_apart() {
        let mut strip = AddedToken::from("<x>", true);
        strip.lstrip = true;
        strip.rstrip = true;
        let control = ControlTokens::new(vec![(TokenId(7), strip)]);
        let pieces: Vec<_> = control.split("a  <x>  <x> b").collect();
        assert_eq!(pieces, [("a", Some(TokenId(7))), ("", Some(TokenId(7))), ("b", None)]);
    }
}
