//! Doubly linked lists over indices, so that a block changes lists in constant time without
//! allocation. Links live in one array per kind of list member.
//!
//! A list does not know what its members are. Invariant: an index is on at most one of the lists
//! that share a link array; the caller keeps that by recording each member's state.

const NONE: u32 = u32::MAX;

/// Neighbours of one index.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    prev: u32,
    next: u32,
}

/// The link array for `n` indices.
pub(crate) fn links(n: usize) -> Vec<Link> {
    vec![Link { prev: NONE, next: NONE }; n]
}

/// One list: oldest at the front.
#[derive(Debug)]
pub(crate) struct List {
    head: u32,
    tail: u32,
    len: u32,
}

impl Default for List {
    fn default() -> Self {
        Self { head: NONE, tail: NONE, len: 0 }
    }
}

impl List {
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn front(&self) -> Option<u32> {
        (self.head != NONE).then_some(self.head)
    }

    pub(crate) fn push_back(&mut self, links: &mut [Link], i: u32) {
        links[i as usize] = Link { prev: self.tail, next: NONE };
        match self.tail {
            NONE => self.head = i,
            tail => links[tail as usize].next = i,
        }
        self.tail = i;
        self.len += 1;
    }

    pub(crate) fn push_front(&mut self, links: &mut [Link], i: u32) {
        links[i as usize] = Link { prev: NONE, next: self.head };
        match self.head {
            NONE => self.tail = i,
            head => links[head as usize].prev = i,
        }
        self.head = i;
        self.len += 1;
    }

    pub(crate) fn remove(&mut self, links: &mut [Link], i: u32) {
        let Link { prev, next } = links[i as usize];
        match prev {
            NONE => self.head = next,
            prev => links[prev as usize].next = next,
        }
        match next {
            NONE => self.tail = prev,
            next => links[next as usize].prev = prev,
        }
        self.len -= 1;
    }

    pub(crate) fn iter<'a>(&self, links: &'a [Link]) -> impl Iterator<Item = u32> + 'a {
        let mut at = self.head;
        std::iter::from_fn(move || {
            let i = (at != NONE).then_some(at)?;
            at = links[i as usize].next;
            Some(i)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_leave_from_anywhere_and_order_stays() {
        let mut links = links(5);
        let mut list = List::default();
        for i in 0..4 {
            list.push_back(&mut links, i);
        }
        list.push_front(&mut links, 4);
        for gone in [1, 4, 3] {
            list.remove(&mut links, gone);
        }
        assert_eq!(list.iter(&links).collect::<Vec<_>>(), [0, 2]);
        assert_eq!((list.len(), list.front()), (2, Some(0)));
        list.remove(&mut links, 0);
        list.remove(&mut links, 2);
        assert_eq!((list.len(), list.front()), (0, None));
    }
}
