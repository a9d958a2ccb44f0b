//! When a group that is gone should serve again, and whether that is worth waiting for in line.
//!
//! It foresees one thing: that a start takes as long as the last one did. It starts nothing and holds no
//! clock. Invariant: before the first group served there is no absence, and while one serves there is none.

use std::time::{Duration, Instant};

/// New requests wait in line through an absence that should last no longer than this, and are refused in a
/// longer one: clients that are told when to come again are better off than those that hear nothing.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// What a client is told at least.
const SOON: Duration = Duration::from_secs(1);

/// The lives of a group, as far as they say when the next one should serve.
#[derive(Debug)]
pub(crate) struct Absence {
    /// When the newest start began, or is to begin.
    begins: Instant,
    /// How long the newest start took that led to a group that serves.
    took: Option<Duration>,
    /// When the group ended that served last; nothing while one serves, or before any did.
    since: Option<Instant>,
}

/// An absence as it looks from within.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outlook {
    /// Until the group should serve; at least a second.
    pub(crate) left: Duration,
    /// Whether it is longer, from its beginning, than anybody is to wait in line for.
    pub(crate) long: bool,
}

impl Absence {
    /// The first start begins.
    pub(crate) const fn new(now: Instant) -> Self {
        Self { begins: now, took: None, since: None }
    }

    /// The next start begins then.
    pub(crate) const fn begins(&mut self, at: Instant) {
        self.begins = at;
    }

    /// A group serves.
    pub(crate) fn serves(&mut self, now: Instant) {
        self.took = Some(now.saturating_duration_since(self.begins));
        self.since = None;
    }

    /// The group is gone. A start that failed goes on with the absence that it was to end.
    pub(crate) fn lost(&mut self, now: Instant) {
        if self.took.is_some() {
            self.since.get_or_insert(now);
        }
        // Whoever starts the next one may have said already when.
        self.begins = self.begins.max(now);
    }

    /// What is to be expected of the present absence, if there is one.
    pub(crate) fn outlook(&self, now: Instant) -> Option<Outlook> {
        let since = self.since?;
        let back = self.begins + self.took.unwrap_or_default();
        // One that lasts longer than foreseen is as long as it is.
        let whole = back.max(now).saturating_duration_since(since);
        let left = back.saturating_duration_since(now).max(SOON);
        Some(Outlook { left, long: whole > PATIENCE })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// A group that needed so long, and died ten seconds later.
    fn died(took: Duration) -> (Absence, Instant) {
        let begun = Instant::now();
        let mut absence = Absence::new(begun);
        assert_eq!(absence.outlook(begun + took), None, "nobody was there yet");
        absence.serves(begun + took);
        let end = begun + took + seconds(10);
        assert_eq!(absence.outlook(end), None, "it serves");
        absence.lost(end);
        (absence, end)
    }

    #[test]
    fn an_absence_lasts_as_long_as_the_last_start() {
        let (mut absence, end) = died(seconds(30));
        let expect = |left, long| Some(Outlook { left: seconds(left), long });
        assert_eq!(absence.outlook(end), expect(30, true));
        absence.begins(end + seconds(2));
        assert_eq!(absence.outlook(end), expect(32, true), "it does not start at once");
        assert_eq!(absence.outlook(end + seconds(12)), expect(20, true));
        assert_eq!(absence.outlook(end + seconds(40)), expect(1, true), "late, but soon");
        absence.serves(end + seconds(42));
        assert_eq!(absence.outlook(end + seconds(42)), None);
        absence.lost(end + seconds(50));
        assert_eq!(absence.outlook(end + seconds(50)), expect(40, true), "as the newest took");
    }

    #[test]
    fn a_short_one_is_waited_for_until_it_turns_out_long() {
        let (mut absence, end) = died(seconds(2));
        let long = |absence: &Absence, after| absence.outlook(end + after).map(|it| it.long);
        assert_eq!(long(&absence, Duration::ZERO), Some(false));
        assert_eq!(long(&absence, PATIENCE), Some(false));
        assert_eq!(long(&absence, PATIENCE + Duration::from_millis(1)), Some(true));
        // A start that fails does not begin another absence, and a long pause before the next counts.
        absence.lost(end + seconds(1));
        absence.begins(end + seconds(2));
        assert_eq!(long(&absence, seconds(1)), Some(false));
        absence.begins(end + seconds(4));
        assert_eq!(long(&absence, seconds(1)), Some(true));
    }

    #[test]
    fn who_says_first_when_the_next_begins_is_heard() {
        let (mut absence, end) = died(seconds(30));
        absence.begins(end + seconds(8));
        absence.lost(end + seconds(1));
        assert_eq!(absence.outlook(end).map(|it| it.left), Some(seconds(38)));
    }
}
