//! Stop strings in a stream of text.
//!
//! Text that may be the start of a stop string is held back until it is or is not. The earliest
//! match wins, and of matches at one place the longest. Invariant: what was given out contains no
//! stop string (unless it is to be included).

/// What a piece of text led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopMatch {
    /// No stop string so far; this text may be given out.
    Text(String),
    /// A stop string ended here; this is the last text.
    Stopped(String),
}

/// Watches one sequence.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    include: bool,
    held: String,
}

impl StopMatcher {
    /// For `stops`; `include` keeps the stop string in the text. Empty strings never match.
    #[must_use]
    pub fn new(stops: Vec<String>, include: bool) -> Self {
        let stops = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        Self { stops, include, held: String::new() }
    }

    /// Takes the next text.
    pub fn push(&mut self, text: &str) -> StopMatch {
        if self.stops.is_empty() {
            return StopMatch::Text(text.to_owned());
        }
        self.held.push_str(text);
        let found = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at, stop.len())))
            .min_by_key(|(at, len)| (*at, std::cmp::Reverse(*len)));
        if let Some((at, len)) = found {
            self.held.truncate(if self.include { at + len } else { at });
            return StopMatch::Stopped(std::mem::take(&mut self.held));
        }
        let keep = self.open_suffix();
        let give = self.held.len() - keep;
        StopMatch::Text(self.held.drain(..give).collect())
    }

    /// What was held back when the sequence ended without a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end that a stop string may begin with.
    fn open_suffix(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let first = self.held.len().saturating_sub(longest.saturating_sub(1));
        (first..self.held.len())
            .filter(|at| self.held.is_char_boundary(*at))
            .find(|at| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..])))
            .map_or(0, |at| self.held.len() - at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| (*s).into()).collect(), include);
        let mut out = String::new();
        for piece in pieces {
            match matcher.push(piece) {
                StopMatch::Text(text) => out += &text,
                StopMatch::Stopped(text) => return (out + &text, true),
            }
        }
        (out + &matcher.finish(), false)
    }

    #[test]
    fn a_stop_string_is_found_however_the_text_is_cut() {
        let text = "one two THE END three";
        for cut in 1..text.len() {
            let (a, b) = text.split_at(cut);
            assert_eq!(run(&["THE END"], false, &[a, b]), ("one two ".into(), true));
            assert_eq!(run(&["THE END"], true, &[a, b]), ("one two THE END".into(), true));
            assert_eq!(run(&["absent"], false, &[a, b]), (text.into(), false));
        }
        let letters: Vec<String> = text.chars().map(String::from).collect();
        let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
        assert_eq!(run(&["END", "THE END"], false, &letters), ("one two ".into(), true));
    }

    #[test]
    fn what_only_looked_like_a_stop_is_given_out() {
        assert_eq!(run(&["abcd"], false, &["ab", "c", "x"]), ("abcx".into(), false));
        assert_eq!(run(&["aab"], false, &["aa", "a", "b", "z"]), ("a".into(), true));
        assert_eq!(run(&["é!"], false, &["caf", "é", "?"]), ("café?".into(), false));
        assert_eq!(run(&[""], false, &["x"]), ("x".into(), false));
    }
}
