//! How the cache's bytes are divided: a pure function from what a worker offers to a [`Carving`].
//!
//! Super-blocks have one size for all groups; each is bound to a group while any of its blocks is
//! in use. The smallest size that wastes little in every group is taken, because many small
//! super-blocks move between groups more freely than few large ones.
//! It does not allocate and does not know addresses. Invariant: every block lies inside the cache.

use ids::{Bytes, GroupId};
use step::{Carving, GroupSpec};

/// Blocks of the largest kind tried per super-block.
const MULTIPLES_TRIED: u64 = 64;
/// A size that wastes at most this share (in 1/1000) in every group is good enough.
const WASTE_PER_MILLE: u64 = 20;

/// Why a cache cannot be carved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CarveError {
    /// The model declares no cache group.
    #[error("the worker declares no cache group")]
    NoGroups,
    /// Groups are numbered from 0 in order.
    #[error("cache group {found} stands where group {expected} belongs")]
    Misnumbered {
        /// The number at fault.
        found: GroupId,
        /// Its position.
        expected: GroupId,
    },
    /// A group with empty blocks, or an alignment of zero.
    #[error("cache group {0} has blocks of zero bytes or the worker an alignment of zero")]
    Empty(GroupId),
    /// Not one super-block per group.
    #[error(
        "the cache has {have} bytes and needs at least {need} (one super-block of {super_bytes} \
         bytes for each of {groups} groups); give the cache more memory"
    )]
    TooSmall {
        /// Bytes offered.
        have: Bytes,
        /// Bytes needed.
        need: Bytes,
        /// Bytes of a super-block.
        super_bytes: Bytes,
        /// Groups.
        groups: usize,
    },
    /// More blocks than ids.
    #[error("the cache holds more than 2^32 blocks")]
    TooManyBlocks,
}

/// Divides `cache_bytes` into super-blocks aligned to `alignment`.
///
/// # Errors
/// When the offer makes no sense or is too small; see [`CarveError`].
pub fn carve(
    groups: &[GroupSpec],
    cache_bytes: Bytes,
    alignment: Bytes,
) -> Result<Carving, CarveError> {
    let Some(largest) = groups.iter().map(|g| g.block_bytes.0).max() else {
        return Err(CarveError::NoGroups);
    };
    for (i, spec) in groups.iter().enumerate() {
        if spec.group.index() != i {
            let expected = GroupId(u8::try_from(i).unwrap_or(u8::MAX));
            return Err(CarveError::Misnumbered { found: spec.group, expected });
        }
        if spec.block_bytes.0 == 0 || alignment.0 == 0 {
            return Err(CarveError::Empty(spec.group));
        }
    }
    let waste = |size: u64| {
        // Overflow would need blocks of 2^54 bytes; treat as wasteful.
        groups
            .iter()
            .map(|g| (size % g.block_bytes.0).saturating_mul(1000) / size)
            .max()
            .unwrap_or(1000)
    };
    let sizes = (1..=MULTIPLES_TRIED)
        .filter_map(|m| largest.checked_mul(m)?.checked_next_multiple_of(alignment.0))
        // Every group must keep at least one super-block.
        .take_while(|size| {
            size.checked_mul(groups.len() as u64).is_some_and(|need| need <= cache_bytes.0)
        });
    let mut best: Option<(u64, u64)> = None;
    for size in sizes {
        let wasted = waste(size);
        if best.is_none_or(|(least, _)| wasted < least) {
            best = Some((wasted, size));
        }
        if wasted <= WASTE_PER_MILLE {
            break;
        }
    }
    let Some((_, super_bytes)) = best else {
        let size = largest.checked_next_multiple_of(alignment.0).unwrap_or(u64::MAX);
        return Err(CarveError::TooSmall {
            have: cache_bytes,
            need: Bytes(size.saturating_mul(groups.len() as u64)),
            super_bytes: Bytes(size),
            groups: groups.len(),
        });
    };
    let too_many = |_| CarveError::TooManyBlocks;
    let supers = u32::try_from(cache_bytes.0 / super_bytes).map_err(too_many)?;
    let mut per_super = Vec::with_capacity(groups.len());
    for spec in groups {
        let blocks = u32::try_from(super_bytes / spec.block_bytes.0).map_err(too_many)?;
        // `u32::MAX` is the absent index of every list here.
        if blocks.checked_mul(supers).is_none_or(|all| all == u32::MAX) {
            return Err(CarveError::TooManyBlocks);
        }
        per_super.push(blocks);
    }
    Ok(Carving { super_bytes: Bytes(super_bytes), supers, per_super, host_blocks: 0 })
}

/// Blocks of each group that `bytes` of the host's memory hold: as many of one group as of another,
/// since a token's KV is there when every group has it. Sliding groups need fewer and waste some.
#[must_use]
pub fn host_blocks(groups: &[GroupSpec], bytes: Bytes) -> u32 {
    let each = groups.iter().fold(0_u64, |sum, group| sum.saturating_add(group.block_bytes.0));
    let blocks = bytes.0.checked_div(each).unwrap_or(0);
    // `u32::MAX` is the absent index of every list here.
    u32::try_from(blocks).map_or(u32::MAX - 1, |blocks| blocks.min(u32::MAX - 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use step::GroupKind;

    fn spec(group: u8, block_bytes: u64) -> GroupSpec {
        GroupSpec { group: GroupId(group), kind: GroupKind::Full, block_bytes: Bytes(block_bytes) }
    }

    #[test]
    fn one_group_is_the_trivial_case() {
        let carving = carve(&[spec(0, 4096)], Bytes(100_000), Bytes(256)).expect("fits");
        assert_eq!((carving.super_bytes, carving.supers), (Bytes(4096), 24));
        assert_eq!(carving.per_super, [1]);
    }

    #[test]
    fn two_groups_share_one_size_with_little_waste() {
        let groups = [spec(0, 1000), spec(1, 3000)];
        let carving = carve(&groups, Bytes(1 << 20), Bytes(512)).expect("fits");
        assert_eq!(carving.super_bytes.0 % 512, 0);
        for (spec, per) in groups.iter().zip(&carving.per_super) {
            let used = spec.block_bytes.0 * u64::from(*per);
            assert!(used <= carving.super_bytes.0);
            assert!((carving.super_bytes.0 - used) * 1000 / carving.super_bytes.0 <= 60);
        }
        assert!(carving.super_bytes.0 * u64::from(carving.supers) <= 1 << 20);
    }

    #[test]
    fn the_hosts_memory_holds_as_many_blocks_of_every_group() {
        let two = [spec(0, 1000), spec(1, 3000)];
        assert_eq!(host_blocks(&two, Bytes(3999)), 0);
        assert_eq!(host_blocks(&two, Bytes(8000)), 2);
        assert_eq!(host_blocks(&two, Bytes(u64::MAX)), u32::MAX - 1);
        assert_eq!(host_blocks(&[], Bytes(8000)), 0);
    }

    #[test]
    fn an_impossible_offer_is_refused_with_its_numbers() {
        assert_eq!(carve(&[], Bytes(1), Bytes(1)), Err(CarveError::NoGroups));
        assert_eq!(carve(&[spec(0, 0)], Bytes(1), Bytes(1)), Err(CarveError::Empty(GroupId(0))));
        assert!(matches!(
            carve(&[spec(1, 8)], Bytes(1), Bytes(1)),
            Err(CarveError::Misnumbered { .. })
        ));
        let two = [spec(0, 8), spec(1, 64)];
        assert_eq!(
            carve(&two, Bytes(100), Bytes(16)),
            Err(CarveError::TooSmall {
                have: Bytes(100),
                need: Bytes(128),
                super_bytes: Bytes(64),
                groups: 2
            })
        );
        assert_eq!(carve(&[spec(0, 1)], Bytes(1 << 40), Bytes(1)), Err(CarveError::TooManyBlocks));
    }
}
