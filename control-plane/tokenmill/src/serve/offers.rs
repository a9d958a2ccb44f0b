//! What the ranks of a group offer, until it is known what all of them have in common.
//!
//! It sends nothing. Invariant: what a group is configured with every one of its ranks can hold, and ranks
//! that are not of one model and one mesh are refused by name.

use ids::{Bytes, Rank};
use std::fmt::Debug;
use step::{Carving, GroupSpec, Hello, Mesh, Seat};

/// Hellos and readiness of one life.
#[derive(Debug, Default)]
pub(crate) struct Offers {
    hellos: Vec<Option<Hello>>,
    /// What the group is configured with.
    agreed: Option<(Vec<GroupSpec>, Carving)>,
    ready: Vec<bool>,
}

impl Offers {
    /// Of a group of so many ranks.
    pub(crate) fn new(ranks: usize) -> Self {
        Self { hellos: vec![None; ranks], agreed: None, ready: vec![false; ranks] }
    }

    pub(crate) fn hello(&mut self, rank: Rank, hello: Hello) {
        if let Some(place) = self.hellos.get_mut(rank.index()) {
            *place = Some(hello);
        }
    }

    /// Every rank's hello, once, when the last one has come.
    pub(crate) fn complete(&mut self) -> Option<Vec<Hello>> {
        if !self.hellos.iter().all(Option::is_some) {
            return None;
        }
        Some(std::mem::take(&mut self.hellos).into_iter().flatten().collect())
    }

    pub(crate) fn configured(&mut self, groups: Vec<GroupSpec>, carving: Carving) {
        self.agreed = Some((groups, carving));
    }

    /// A rank has carved its memory; what the group works with, when it was the last.
    pub(crate) fn ready(&mut self, rank: Rank) -> Option<(Vec<GroupSpec>, Carving)> {
        *self.ready.get_mut(rank.index())? = true;
        if self.ready.iter().all(|ready| *ready) { self.agreed.take() } else { None }
    }
}

/// Cache groups and carving that every rank can hold.
///
/// # Errors
/// Names the rank that is not what it was started as, or not what the others are.
pub(crate) fn agree(mesh: Mesh, hellos: &[Hello]) -> Result<(Vec<GroupSpec>, Carving), String> {
    let first = hellos.first().ok_or("no rank said hello")?;
    for (rank, hello) in mesh.ranks().zip(hellos) {
        let seat = Seat { mesh, rank };
        same(rank, "its place", &hello.seat, &seat)?;
        same(rank, "the architecture", &hello.architecture, &first.architecture)?;
        same(rank, "the vocabulary", &hello.vocab, &first.vocab)?;
        same(rank, "the backend", &hello.backend, &first.backend)?;
        same(rank, "the cache groups", &hello.groups, &first.groups)?;
    }
    let bytes = hellos.iter().map(|hello| hello.cache_bytes).min().unwrap_or(Bytes::ZERO);
    let alignment = hellos.iter().map(|hello| hello.alignment).max().unwrap_or(Bytes(1));
    let carving = kv_cache::carve(&first.groups, bytes, alignment)
        .map_err(|error| format!("the workers' cache cannot be divided: {error}"))?;
    let host = hellos.iter().map(|hello| hello.host_bytes).min().unwrap_or(Bytes::ZERO);
    let host_blocks = kv_cache::host_blocks(&first.groups, host);
    if host_blocks == 0 && host > Bytes::ZERO {
        return Err(format!(
            "{host} bytes behind the workers' cache hold not one block; give more"
        ));
    }
    Ok((first.groups.clone(), Carving { host_blocks, ..carving }))
}

fn same<T: PartialEq + Debug>(rank: Rank, what: &str, got: &T, wanted: &T) -> Result<(), String> {
    if got == wanted {
        return Ok(());
    }
    Err(format!("rank {rank} says that {what} is {got:?}, the group needs {wanted:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ids::{GroupId, Tokens};
    use step::GroupKind;

    fn hello(mesh: Mesh, rank: u32, cache: u64) -> Hello {
        Hello {
            architecture: "Model".into(),
            vocab: 9,
            max_context: Tokens(64),
            groups: vec![GroupSpec {
                group: GroupId(0),
                kind: GroupKind::Full,
                block_bytes: Bytes(64),
            }],
            cache_bytes: Bytes(cache),
            alignment: Bytes(64),
            backend: "cpu".into(),
            seat: Seat { mesh, rank: Rank(rank) },
            weight_bytes: Bytes(1),
            host_bytes: Bytes(0),
        }
    }

    #[test]
    fn the_smallest_cache_is_what_all_are_carved_to() {
        let mesh = Mesh { dp: 1, tp: 2, expert_parallel: false };
        let hellos = [hello(mesh, 0, 64 * 100), hello(mesh, 1, 64 * 80)];
        let (groups, carving) = agree(mesh, &hellos).expect("they agree");
        let alone = kv_cache::carve(&groups, Bytes(64 * 80), Bytes(64)).expect("carved");
        assert_eq!(carving, alone);
    }

    #[test]
    fn the_least_memory_behind_the_cache_is_what_all_use() {
        let mesh = Mesh { dp: 1, tp: 2, expert_parallel: false };
        let offers = |one, other| {
            let with = |rank, bytes| Hello { host_bytes: Bytes(bytes), ..hello(mesh, rank, 6400) };
            agree(mesh, &[with(0, one), with(1, other)]).map(|(_, carving)| carving.host_blocks)
        };
        assert_eq!(offers(64 * 9, 64 * 5), Ok(5));
        assert_eq!(offers(64 * 9, 0), Ok(0));
        let error = offers(64 * 9, 63).expect_err("not one block");
        assert!(error.contains("63 bytes behind"), "{error}");
    }

    #[test]
    fn a_rank_that_is_another_than_it_was_started_as_is_named() {
        let mesh = Mesh { dp: 2, tp: 1, expert_parallel: false };
        let right = hello(mesh, 1, 6400);
        let wrong = [
            (Hello { vocab: 8, ..right.clone() }, "the vocabulary"),
            (Hello { seat: Seat { mesh, rank: Rank(0) }, ..right.clone() }, "its place"),
            (Hello { groups: Vec::new(), ..right.clone() }, "the cache groups"),
            (Hello { backend: "cuda".into(), ..right }, "the backend"),
        ];
        for (second, what) in wrong {
            let error = agree(mesh, &[hello(mesh, 0, 6400), second]).expect_err(what);
            assert!(error.contains("rank 1") && error.contains(what), "{error}");
        }
    }

    #[test]
    fn a_group_is_ready_when_its_last_rank_is() {
        let mesh = Mesh { dp: 1, tp: 2, expert_parallel: false };
        let mut offers = Offers::new(2);
        offers.hello(Rank(1), hello(mesh, 1, 6400));
        assert_eq!(offers.complete(), None);
        offers.hello(Rank(0), hello(mesh, 0, 6400));
        let (groups, carving) = agree(mesh, &offers.complete().expect("both")).expect("agreed");
        offers.configured(groups, carving.clone());
        assert_eq!(offers.ready(Rank(1)), None);
        assert_eq!(offers.ready(Rank(0)).map(|(_, carved)| carved), Some(carving));
    }
}
