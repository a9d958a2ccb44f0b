//! Where requests live: a vector with a free list, so that a key is an index.
//!
//! It knows nothing of order or state. Invariant: a key is valid from insertion to removal.

/// Where a request lives. Internal; clients know [`ids::RequestId`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key(u32);

#[derive(Debug)]
pub(crate) struct Slab<T> {
    cells: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { cells: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    pub(crate) fn insert(&mut self, value: T) -> Key {
        if let Some(at) = self.free.pop() {
            self.cells[at as usize] = Some(value);
            return Key(at);
        }
        self.cells.push(Some(value));
        Key(u32::try_from(self.cells.len() - 1).unwrap_or(u32::MAX))
    }

    pub(crate) fn get(&self, key: Key) -> Option<&T> {
        self.cells.get(key.0 as usize)?.as_ref()
    }

    pub(crate) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        self.cells.get_mut(key.0 as usize)?.as_mut()
    }

    /// Takes the value out for a transition; `put` or `vacate` must follow.
    pub(crate) fn take(&mut self, key: Key) -> Option<T> {
        self.cells.get_mut(key.0 as usize)?.take()
    }

    pub(crate) fn put(&mut self, key: Key, value: T) {
        self.cells[key.0 as usize] = Some(value);
    }

    /// Frees the key of a value that was taken out.
    pub(crate) fn vacate(&mut self, key: Key) {
        debug_assert!(self.get(key).is_none());
        self.free.push(key.0);
    }

    pub(crate) fn keys(&self) -> Vec<Key> {
        let occupied = (0..).map(Key).zip(&self.cells).filter(|(_, cell)| cell.is_some());
        occupied.map(|(key, _)| key).collect()
    }
}
