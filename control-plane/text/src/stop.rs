//! Stop strings, found while text arrives in pieces.
//!
//! One Knuth-Morris-Pratt automaton per stop string runs over the bytes of the text, so the cost
//! is linear and what was found does not depend on how the text was cut into pieces. It knows no
//! tokens: whoever feeds one token's text at a time knows how many it fed. Invariants: text is held
//! back exactly as long as it may be the beginning of a stop string; the match that ends first
//! wins, and of those the longest.

use std::sync::Arc;

/// Stop strings, prepared for matching. Shared by the choices of a request.
#[derive(Clone, Debug, Default)]
pub struct StopStrings(Arc<[Pattern]>);

#[derive(Debug)]
struct Pattern {
    text: Box<str>,
    /// `fallback[i]`: length of the longest proper prefix of the first `i` bytes that ends them.
    fallback: Box<[u32]>,
}

impl StopStrings {
    /// Prepares `strings`; empty ones would match everywhere and are left out.
    #[must_use]
    pub fn new<S: AsRef<str>>(strings: &[S]) -> Self {
        let patterns = strings.iter().map(AsRef::as_ref).filter(|text| !text.is_empty());
        Self(patterns.map(Pattern::new).collect())
    }

    /// Whether nothing can match.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Pattern {
    fn new(text: &str) -> Self {
        let bytes = text.as_bytes();
        let mut fallback = vec![0_u32; bytes.len() + 1];
        let mut matched = 0_usize;
        for i in 1..bytes.len() {
            while matched > 0 && bytes[i] != bytes[matched] {
                matched = fallback[matched] as usize;
            }
            matched += usize::from(bytes[i] == bytes[matched]);
            fallback[i + 1] = matched as u32;
        }
        Self { text: text.into(), fallback: fallback.into() }
    }

    /// The state after `byte`: how many bytes of the pattern end the text.
    fn advance(&self, state: u32, byte: u8) -> u32 {
        let bytes = self.text.as_bytes();
        let mut state = state as usize;
        if state == bytes.len() {
            state = self.fallback[state] as usize;
        }
        while state > 0 && bytes[state] != byte {
            state = self.fallback[state] as usize;
        }
        (state + usize::from(bytes[state] == byte)) as u32
    }
}

/// A stop string that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopMatch {
    /// Which one.
    pub stop: Box<str>,
}

/// Looks for stop strings in text that arrives in pieces.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: StopStrings,
    /// Per pattern, the automaton's state.
    states: Box<[u32]>,
    /// Text not yet handed out: the longest state in bytes.
    held: String,
    include_stop: bool,
}

impl StopMatcher {
    /// A matcher at the start of a text. `include_stop` keeps a found stop string in the text.
    #[must_use]
    pub fn new(stops: StopStrings, include_stop: bool) -> Self {
        let states = vec![0; stops.0.len()].into();
        Self { stops, states, held: String::new(), include_stop }
    }

    /// Takes `piece` and appends to `out` what is certain by now. On a match `out` ends where the
    /// text ends and nothing may be pushed afterwards. While not `armed` a match does not count,
    /// though one that begins in such text and ends later does.
    pub fn push(&mut self, piece: &str, armed: bool, out: &mut String) -> Option<StopMatch> {
        if self.stops.is_empty() {
            out.push_str(piece);
            return None;
        }
        for (offset, &byte) in piece.as_bytes().iter().enumerate() {
            let mut found: Option<&Pattern> = None;
            for (pattern, state) in self.stops.0.iter().zip(&mut self.states) {
                *state = pattern.advance(*state, byte);
                let complete = *state as usize == pattern.text.len();
                if complete && armed && found.is_none_or(|f| f.text.len() < pattern.text.len()) {
                    found = Some(pattern);
                }
            }
            if let Some(pattern) = found {
                let stop = pattern.text.clone();
                self.held.push_str(&piece[..=offset]);
                let keep = self.held.len() - if self.include_stop { 0 } else { stop.len() };
                out.push_str(&self.held[..keep]);
                self.held.clear();
                return Some(StopMatch { stop });
            }
        }
        self.held.push_str(piece);
        // A complete state is a match that did not count; only what may still grow is held.
        let pending = self.stops.0.iter().zip(&self.states).map(|(pattern, &state)| {
            let complete = state as usize == pattern.text.len();
            if complete { pattern.fallback[state as usize] } else { state }
        });
        let keep = self.held.len() - pending.max().unwrap_or(0) as usize;
        out.push_str(&self.held[..keep]);
        self.held.drain(..keep);
        None
    }

    /// The text ended otherwise: hands out what was held back.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Text and stop string found when `pieces` are pushed in turn.
    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (String, Option<Box<str>>, usize) {
        let mut matcher = StopMatcher::new(StopStrings::new(stops), include);
        let mut out = String::new();
        for (i, piece) in pieces.iter().enumerate() {
            if let Some(found) = matcher.push(piece, true, &mut out) {
                return (out, Some(found.stop), i + 1);
            }
        }
        matcher.finish(&mut out);
        (out, None, pieces.len())
    }

    #[test]
    fn a_stop_string_is_found_across_pieces() {
        let pieces = ["Hel", "lo E", "N", "D and", " more"];
        assert_eq!(run(&["END"], false, &pieces), ("Hello ".into(), Some("END".into()), 4));
        assert_eq!(run(&["END"], true, &pieces), ("Hello END".into(), Some("END".into()), 4));
        assert_eq!(run(&["nope"], false, &pieces).0, "Hello END and more");
    }

    #[test]
    fn only_what_may_become_a_stop_string_is_held() {
        let mut matcher = StopMatcher::new(StopStrings::new(&["\n\nHuman:", "ab"]), false);
        let mut out = String::new();
        assert_eq!(matcher.push("one\n", true, &mut out), None);
        assert_eq!(out, "one");
        assert_eq!(matcher.push("two\n\nHu", true, &mut out), None);
        assert_eq!(out, "one\ntwo");
        assert_eq!(matcher.push("h a", true, &mut out), None);
        assert_eq!(out, "one\ntwo\n\nHuh ");
        matcher.finish(&mut out);
        assert_eq!(out, "one\ntwo\n\nHuh a");
    }

    #[test]
    fn a_match_before_the_minimum_does_not_count_but_may_straddle_it() {
        let mut matcher = StopMatcher::new(StopStrings::new(&["aab"]), false);
        let mut out = String::new();
        assert_eq!(matcher.push("aab a", false, &mut out), None);
        assert_eq!(out, "aab ");
        let found = matcher.push("ab", true, &mut out);
        assert_eq!((out.as_str(), found.is_some()), ("aab ", true));
    }

    /// By definition: the shortest text that ends with a stop string; of those strings the longest.
    fn oracle(stops: &[String], text: &str) -> Option<(usize, usize)> {
        (1..=text.len()).find_map(|end| {
            let lengths = stops.iter().filter(|s| text.as_bytes()[..end].ends_with(s.as_bytes()));
            lengths.map(String::len).max().map(|len| (end - len, end))
        })
    }

    proptest! {
        #[test]
        fn the_cut_does_not_matter(
            text in "[abé]{0,40}",
            stops in prop::collection::vec("[abé]{1,5}", 1..4),
            cuts in prop::collection::vec(0_usize..60, 0..6),
            include: bool,
        ) {
            let mut bounds: Vec<usize> = cuts.into_iter().filter(|c| text.is_char_boundary(*c)).collect();
            bounds.extend([0, text.len()]);
            bounds.sort_unstable();
            let pieces: Vec<&str> = bounds.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let names: Vec<&str> = stops.iter().map(String::as_str).collect();
            let (got, found, _) = run(&names, include, &pieces);
            match oracle(&stops, &text) {
                None => prop_assert_eq!((got.as_str(), found), (text.as_str(), None)),
                Some((start, end)) => {
                    prop_assert_eq!(&got, &text[..if include { end } else { start }]);
                    prop_assert_eq!(found.as_deref(), Some(&text[start..end]));
                }
            }
        }
    }
}
