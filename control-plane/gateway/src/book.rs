//! Which request of a client became which generations, and when it came and was answered.
//!
//! A ring of the newest requests, the oldest forgotten first; the engine's own journal knows generations
//! by number alone. Names are looked up, never trusted: a client's own is only another name. Invariant:
//! at most [`VISITS`] requests and [`NAMED`] of their generations are held, each with a bounded name.

use ids::RequestId;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Requests that are held.
pub(crate) const VISITS: usize = 16_384;
/// Generations that are held; a request of many choices pushes out several others.
const NAMED: usize = 4 * VISITS;

/// One request for generations.
#[derive(Clone, Debug)]
pub(crate) struct Visit {
    /// The server's own name for it.
    pub(crate) id: String,
    /// The client's name for it.
    pub(crate) client_id: Option<String>,
    pub(crate) door: &'static str,
    /// When its header had been read.
    pub(crate) received: Instant,
    /// When its generations were submitted.
    pub(crate) submitted: Instant,
    /// When the last of its reply was given to the connection, or the connection was gone.
    pub(crate) replied: Option<Instant>,
    pub(crate) generations: Vec<RequestId>,
}

/// The ring.
#[derive(Debug, Default)]
pub(crate) struct Book(Mutex<Pages>);

#[derive(Debug, Default)]
struct Pages {
    visits: VecDeque<Visit>,
    /// Forgotten before the first of them.
    gone: u64,
    /// Generations of all.
    named: usize,
}

impl Book {
    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request was submitted. Returns its line, for [`Book::replied`].
    pub(crate) fn enter(&self, visit: Visit) -> u64 {
        let mut pages = self.pages();
        pages.named += visit.generations.len();
        pages.visits.push_back(visit);
        while pages.visits.len() > VISITS || pages.named > NAMED && pages.visits.len() > 1 {
            let gone = pages.visits.pop_front().map_or(0, |visit| visit.generations.len());
            pages.named -= gone;
            pages.gone += 1;
        }
        pages.gone + pages.visits.len() as u64 - 1
    }

    /// The reply of the request on this line is over.
    pub(crate) fn replied(&self, line: u64) {
        let now = Instant::now();
        let mut pages = self.pages();
        let at = line.checked_sub(pages.gone).and_then(|at| usize::try_from(at).ok());
        if let Some(visit) = at.and_then(|at| pages.visits.get_mut(at)) {
            visit.replied = Some(now);
        }
    }

    /// The newest request of this name: the server's, that of a reply's body, or the client's. And how
    /// many others bear it. A number that is nobody's name is that of a generation.
    pub(crate) fn find(&self, name: &str) -> Option<(Visit, usize)> {
        let pages = self.pages();
        let bare = bare(name);
        let bears = |visit: &&Visit| visit.id == bare || visit.client_id.as_deref() == Some(name);
        let mut found = pages.visits.iter().rev().filter(bears);
        if let Some(newest) = found.next() {
            return Some((newest.clone(), found.count()));
        }
        let number = RequestId(name.parse().ok()?);
        let of = pages.visits.iter().rev().find(|visit| visit.generations.contains(&number))?;
        Some((of.clone(), 0))
    }

    /// How many are held, and when the oldest of them came.
    pub(crate) fn reach(&self) -> (usize, Option<Instant>) {
        let pages = self.pages();
        (pages.visits.len(), pages.visits.front().map(|visit| visit.received))
    }
}

/// The server's part of an id as replies spell it.
pub(crate) fn bare(name: &str) -> &str {
    ["chatcmpl-", "cmpl-"].iter().find_map(|kind| name.strip_prefix(kind)).unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visit(id: &str, client_id: Option<&str>, generations: &[u64]) -> Visit {
        let now = Instant::now();
        Visit {
            id: id.to_owned(),
            client_id: client_id.map(str::to_owned),
            door: "/v1/completions",
            received: now,
            submitted: now,
            replied: None,
            generations: generations.iter().copied().map(RequestId).collect(),
        }
    }

    #[test]
    fn every_name_leads_to_the_request() {
        let book = Book::default();
        book.enter(visit("aa", None, &[1, 2]));
        let line = book.enter(visit("bb", Some("mine"), &[3]));
        book.enter(visit("cc", Some("mine"), &[4]));
        let found = |name: &str| book.find(name).map(|(visit, others)| (visit.id, others));
        for name in ["aa", "cmpl-aa", "chatcmpl-aa", "1", "2"] {
            assert_eq!(found(name), Some(("aa".to_owned(), 0)), "{name}");
        }
        assert_eq!(found("mine"), Some(("cc".to_owned(), 1)), "the newest, and there is another");
        assert_eq!(found("3"), Some(("bb".to_owned(), 0)));
        for name in ["dd", "5", ""] {
            assert_eq!(found(name), None, "{name}");
        }
        book.replied(line);
        assert!(book.find("bb").is_some_and(|(visit, _)| visit.replied.is_some()));
        assert!(book.find("aa").is_some_and(|(visit, _)| visit.replied.is_none()));
    }

    #[test]
    fn both_bounds_hold() {
        let book = Book::default();
        let lines: Vec<u64> =
            (0..=VISITS).map(|i| book.enter(visit(&format!("v{i}"), None, &[]))).collect();
        book.replied(lines[0]);
        book.replied(lines[1]);
        assert!(book.find("v1").is_some_and(|(visit, _)| visit.replied.is_some()));
        assert_eq!(book.reach().0, VISITS);
        assert!(book.find("v0").is_none());
        book.enter(visit("many", None, &vec![7; NAMED - 1]));
        assert_eq!(book.reach().0, VISITS);
        book.enter(visit("more", None, &[8, 9]));
        assert_eq!(book.reach().0, 1, "all others make way for those of many generations");
    }
}
