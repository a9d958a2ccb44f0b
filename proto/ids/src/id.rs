//! Identifiers. They name things; they are not measured, added or compared by size
//! (sequence numbers excepted, which are ordered because time is).

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// The value as an index into a table that this id numbers.
            #[must_use]
            pub const fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

id! {
    /// One generation (one choice of one client request). Made by the server, never by a client.
    RequestId(u64)
}
id! {
    /// Who a request is for, as far as sharing goes; 0 is everybody who names nobody. A hash, so that
    /// what a client sent is in no table.
    TenantId(u64)
}
id! {
    /// A row of the worker's slot table.
    SlotId(u32)
}
id! {
    /// How many times a slot has been admitted to; tells a late outcome from a current one.
    SlotGeneration(u32)
}
id! {
    /// A launched step, counted from 1 within an [`Incarnation`]. Also the *epoch* of block
    /// reuse: a block released while step `n` was the newest launched waits for step `n` to retire.
    StepSeq(u64)
}
id! {
    /// A life of the worker group. Everything said to an earlier life is void.
    Incarnation(u64)
}
id! {
    /// A KV block of one cache group.
    BlockId(u32)
}
id! {
    /// A place in the host's memory behind the KV cache that holds one block of one cache group.
    TierSlot(u32)
}
id! {
    /// A cache group: layers whose KV lives and dies together (full attention, sliding window, …).
    GroupId(u8)
}
id! {
    /// A data-parallel shard: its own slots, pool and prefix index.
    ShardId(u16)
}
id! {
    /// A worker process of a group, counted from 0.
    Rank(u32)
}
id! {
    /// A vocabulary entry.
    TokenId(u32)
}

impl StepSeq {
    /// Before any step was launched.
    pub const ZERO: Self = Self(0);

    /// The step launched after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl Incarnation {
    /// The life that follows this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl SlotGeneration {
    /// The generation of the next admission to the same slot.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}
