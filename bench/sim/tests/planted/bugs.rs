//! The bugs to plant: where, and what the line becomes. `PLANTED` is true while the bug is active.
//!
//! Shared by the build script, which writes them into a copy of the sources, and by the test that
//! finds them. Invariant: with none active the copy does what the sources do.

/// A bug that can be switched on.
#[derive(Clone, Copy, Debug)]
#[allow(dead_code, reason = "the build script reads what the test does not")]
pub(crate) struct Bug {
    /// What goes wrong.
    pub(crate) name: &'static str,
    /// The crate below `control-plane` and the file in its `src`.
    pub(crate) file: (&'static str, &'static str),
    /// What the file says.
    pub(crate) from: &'static str,
    /// What the copy says instead.
    pub(crate) to: &'static str,
}

const KV: &str = "kv-cache";
const SCHEDULER: &str = "scheduler";

macro_rules! bugs {
    ($all:ident: $($name:literal, $dir:ident / $file:literal, $from:literal => $to:literal;)*) => {
        pub(crate) const $all: &[Bug] = &[
            $(Bug { name: $name, file: ($dir, $file), from: $from, to: $to },)*
        ];
    };
}

// What storms find.
bugs! { BUGS:
    "blocks are reused while steps in flight use them", KV / "epoch.rs",
        "stamp <= self.through" => "(stamp <= self.through || PLANTED)";
    "cached blocks are evicted before their epoch retires", KV / "pool.rs",
        "if proof.covers(meta.stamp) {" => "if proof.covers(meta.stamp) || PLANTED {";
    "a shared block is freed with its first release", KV / "pool.rs",
        "if meta.refs > 0 {" => "if meta.refs > 0 && !PLANTED {";
    "a hit does not count its reference", KV / "prefix.rs",
        "meta.refs += 1;" => "meta.refs = if PLANTED { 1 } else { meta.refs + 1 };";
    "the window is trimmed a block too early", KV / "prefix.rs",
        "Tokens((position.0 + 1).saturating_sub" =>
        "Tokens((position.0 + if PLANTED { 65 } else { 1 }).saturating_sub";
    "an evicted block keeps its name", KV / "pool.rs",
        "        g.index.remove(block);\n" => "        if !PLANTED { g.index.remove(block); }\n";
    "a block is published under a name that another has", KV / "pool.rs",
        "let indexed = g.index.get(hash).is_none();" =>
        "let indexed = g.index.get(hash).is_none() || PLANTED;";
    "a step that is not due retires", KV / "epoch.rs",
        "if seq != due {" => "if seq != due && !PLANTED {";
    "memory stays with a group that does not use it", KV / "supers.rs",
        "if s.free == g.per_super {" => "if s.free == g.per_super && !PLANTED {";
    "the newest block is evicted first", KV / "pool.rs",
        "group.evictable.push_back(&mut group.links, i);" =>
        "if PLANTED { group.evictable.push_front(&mut group.links, i) } else { group.evictable.push_back(&mut group.links, i) }";
    "unconfirmed tokens are sealed", SCHEDULER / "outcome.rs",
        "seat.tables.seal(&mut life.cache, computed," =>
        "seat.tables.seal(&mut life.cache, if PLANTED { seat.planned } else { computed },";
    "an outcome of an earlier life is taken", SCHEDULER / "outcome.rs",
        "if outcome.incarnation != life.incarnation {" =>
        "if outcome.incarnation != life.incarnation && !PLANTED {";
    "prompt log-probabilities are told twice", SCHEDULER / "outcome.rs",
        "part.entries.drain(..known);\n        part.first = job.logprobs_from;" =>
        "if !PLANTED { part.entries.drain(..known); part.first = job.logprobs_from; }";
    "a sample for another life of a slot is taken", SCHEDULER / "slots.rs",
        "if row.expects == seq && row.generation == s.generation && !row.sampled =>" =>
        "if row.expects == seq && (row.generation == s.generation || PLANTED) && !row.sampled =>";
    "an outcome's samples are not compared with its plan", SCHEDULER / "outcome.rs",
        "!life.slots.matches(seq, &flight.samplers, &outcome.sampled)" =>
        "!(life.slots.matches(seq, &flight.samplers, &outcome.sampled) || PLANTED)";
    "a block is named by the tokens of the block before", SCHEDULER / "job.rs",
        "let start = next * BLOCK" =>
        "let start = (if PLANTED { next.saturating_sub(1) } else { next }) * BLOCK";
    "hashes collide", SCHEDULER / "job.rs",
        "self.grown.push(key.chain(parent, &block));" =>
        "self.grown.push(if PLANTED { BlockHash(key.chain(parent, &block).0 & 7) } else { key.chain(parent, &block) });";
    "one token too many is generated", SCHEDULER / "job.rs",
        "(generated >= self.max_tokens)" =>
        "(generated >= self.max_tokens + Tokens(u32::from(PLANTED)))";
    "blocks are sealed from the wrong end", SCHEDULER / "tables.rs",
        "if let Some(block) = g.writable.pop_front() {\n                    g.shared" =>
        "if let Some(block) = (if PLANTED { g.writable.pop_back() } else { g.writable.pop_front() }) {\n g.shared";
    "a slot is given again while a step refers to it", SCHEDULER / "slots.rs",
        "if retired.covers(launched) {" => "if retired.covers(launched) || PLANTED {";
    "a slot is reused under the same generation", SCHEDULER / "slots.rs",
        "row.generation = row.generation.next();" =>
        "if !PLANTED { row.generation = row.generation.next(); }";
    "a preempted request's tokens are not sent again", SCHEDULER / "preempt.rs",
        "self.upload_to(life.incarnation, key);" =>
        "if !PLANTED { self.upload_to(life.incarnation, key); }";
    "a preempted request is forgotten", SCHEDULER / "preempt.rs",
        "self.line.give_back(rank, key);" => "if !PLANTED { self.line.give_back(rank, key); }";
    "a wake-up is lost", SCHEDULER / "preempt.rs",
        "self.replan = true;" => "self.replan = !PLANTED;";
    "memory on its way is taken from a second victim", SCHEDULER / "preempt.rs",
        "let on_its_way = arriving > draft.claimed;" =>
        "let on_its_way = arriving > draft.claimed && !PLANTED;";
    "who is first in line gives way", SCHEDULER / "preempt.rs",
        "**behind > rank && behind.priority" => "(**behind > rank || PLANTED) && behind.priority";
    "a sacrificed request stays in the plan", SCHEDULER / "preempt.rs",
        "draft.room += draft.chunks.remove(at).tokens;" =>
        "if !PLANTED { draft.room += draft.chunks.remove(at).tokens; }";
    "an aborted request stays in its slot", SCHEDULER / "preempt.rs",
        "life.ops.push(SlotOp::Retire { slot });" =>
        "if !PLANTED { life.ops.push(SlotOp::Retire { slot }); }";
    "the deadline of one that ended fires", SCHEDULER / "preempt.rs",
        "self.deadlines.remove(&(at, key));" => "if !PLANTED { self.deadlines.remove(&(at, key)); }";
    "a hit on the whole prompt leaves nothing to compute", SCHEDULER / "admit.rs",
        "Tokens(job.known().0 - 1).blocks_full()" =>
        "Tokens(job.known().0 - u32::from(!PLANTED)).blocks_full()";
    "prompt log-probabilities skip the cached part", SCHEDULER / "admit.rs",
        " || job.logprobs_due().is_some()" => " || (job.logprobs_due().is_some() && !PLANTED)";
    "later requests overtake", SCHEDULER / "line.rs",
        "self.queued.range((flow, Timestamp::ZERO, 0)..=last).next();" =>
        "{ let mut all = self.queued.range((flow, Timestamp::ZERO, 0)..=last); if PLANTED { all.next_back() } else { all.next() } };";
    "a shortage is remembered after it ended", SCHEDULER / "admit.rs",
        " || life.running.len() < running" => " || (life.running.len() < running && !PLANTED)";
    "limbo is not counted on when one is let in", SCHEDULER / "admit.rs",
        "let victim = if arriving >= missing {" => "let victim = if arriving >= missing && !PLANTED {";
    "one that killed workers runs among others", SCHEDULER / "admit.rs",
        "let alone = life.isolated || life.frugal || job.suspect();" =>
        "let alone = life.frugal || ((life.isolated || job.suspect()) && !PLANTED);";
    "a prompt gives way again and again", SCHEDULER / "prefill.rs",
        "core::mem::replace(&mut job.gave_way, true)" =>
        "core::mem::replace(&mut job.gave_way, !PLANTED)";
    "the decode budget is not kept", SCHEDULER / "prefill.rs",
        "draft.room = room.min(draft.room);" => "if !PLANTED { draft.room = room.min(draft.room); }";
    "a stalled slot stays in the decode set", SCHEDULER / "decode.rs",
        "delta.leave.push(at.slot);" => "if !PLANTED { delta.leave.push(at.slot); }";
    "a step runs ahead of what is allowed", SCHEDULER / "plan.rs",
        "count(life.flights.len()) <= ahead" => "count(life.flights.len()) <= ahead + u32::from(PLANTED)";
    "requests of a dead worker are lost", SCHEDULER / "worker.rs",
        "self.line.give_back(job.rank, key);" => "if !PLANTED { self.line.give_back(job.rank, key); }";
    "a step that hangs is waited for", SCHEDULER / "worker.rs",
        "            && at <= now\n            && let Some(life) = &mut self.life" =>
        "            && at <= now && !PLANTED\n            && let Some(life) = &mut self.life";
    "a shortage outlives the request that felt it", SCHEDULER / "scheduler.rs",
        "self.blocked = self.blocked.filter(|blocked| !blocked.is_of(key));" =>
        "if !PLANTED { self.blocked = self.blocked.filter(|blocked| !blocked.is_of(key)); }";
    "tokens after a stop string are billed", SCHEDULER / "scheduler.rs",
        "live.job_mut().output.truncate(keep.as_usize());" =>
        "if !PLANTED { live.job_mut().output.truncate(keep.as_usize()); }";
    "the queue's bound counts those who left", SCHEDULER / "crowd.rs",
        "            backlog.requests -= 1;\n" => "            if !PLANTED { backlog.requests -= 1; }\n";
    "a place behind the cache keeps its name when it is overwritten", KV / "tier.rs",
        "self.index.remove(BlockId(oldest));" => "if !PLANTED { self.index.remove(BlockId(oldest)); }";
    "what is wanted behind the cache again is no newer", KV / "tier.rs",
        "            self.used.remove(&mut self.links, at.0);\n            self.used.push_back(&mut self.links, at.0);\n            return None;" =>
        "            if !PLANTED { self.used.remove(&mut self.links, at.0); self.used.push_back(&mut self.links, at.0); }\n            return None;";
    "a block gets a place behind the cache and is not copied there", KV / "pool.rs",
        "self.copies.push(SlotOp::Store { group, block, at });" =>
        "if !PLANTED { self.copies.push(SlotOp::Store { group, block, at }); }";
    "a block is brought back from another's place behind the cache", KV / "prefix.rs",
        "SlotOp::Load { at, block:" => "SlotOp::Load { at: if PLANTED { TierSlot(0) } else { at }, block:";
    "blocks for what is behind the cache are not counted when one is let in", KV / "prefix.rs",
        "block.is_none_or(|b| g.metas" => "(!PLANTED || block.is_some()) && block.is_none_or(|b| g.metas";
    "a block is written again before it is behind the cache", SCHEDULER / "admit.rs",
        "        life.copy_first(&mut self.counters);\n        let seat" =>
        "        if !PLANTED { life.copy_first(&mut self.counters); }\n        let seat";
    "what was behind the cache of a dead worker is looked for in the next one's", SCHEDULER / "worker.rs",
        "        if let Some(life) = self.life.take() {\n            self.lose(life);\n        }\n        self.newest = Some(ready.incarnation);\n        let life = self.life.insert(Life::new(ready, self.config.max_running, now));" =>
        "        let mut kept = Vec::new();\n        if let Some(mut life) = self.life.take() {\n            if PLANTED { kept.extend(life.cache.groups.iter_mut().map(|g| g.tier.take())); }\n            self.lose(life);\n        }\n        self.newest = Some(ready.incarnation);\n        let life = self.life.insert(Life::new(ready, self.config.max_running, now));\n        for (g, tier) in life.cache.groups.iter_mut().zip(kept) { g.tier = tier; }";
    "placement ignores load", SCHEDULER / "shards/place.rs",
        "own + self.ahead + LIVE * u64::from(self.live) + self.short" =>
        "own + if PLANTED { 0 } else { self.ahead + LIVE * u64::from(self.live) + self.short }";
    "a hit is looked up in another shard", SCHEDULER / "shards/mod.rs",
        "let weighed = self.shards.iter().map(" =>
        "let weighed = self.shards.iter().cycle().skip(usize::from(PLANTED)).take(self.shards.len()).map(";
    "what was placed weighs nothing until it starts", SCHEDULER / "shards/mod.rs",
        "shard.submit(now, *submit, owes)" => "shard.submit(now, *submit, if PLANTED { 0 } else { owes })";
    "an abort goes to the first shard", SCHEDULER / "shards/mod.rs",
        "let home = self.home(request).unwrap_or(0);" =>
        "let home = self.home(request).filter(|_| !PLANTED).unwrap_or(0);";
    "a shard's outcome is given to another", SCHEDULER / "shards/mod.rs",
        "self.shards.iter_mut().zip(&flight.of).zip(joined.outcomes)\n" =>
        "self.shards.iter_mut().zip(&flight.of).zip({ let mut all = joined.outcomes; if PLANTED { all.reverse(); } all })\n";
    "a shard without work is left out of the bucket", SCHEDULER / "shards/mod.rs",
        "let most = shard_tokens.iter().max().copied().unwrap_or_default();" =>
        "let most = (if PLANTED { shard_tokens.first() } else { shard_tokens.iter().max() }).copied().unwrap_or_default();";
    "a shard that stands still keeps its slots decoding", SCHEDULER / "shards/beside.rs",
        "section.decode.leave.push(request.state.seat.slot.at().slot);" =>
        "if !PLANTED { section.decode.leave.push(request.state.seat.slot.at().slot); }";
    "a shard that stands still tells nobody who left", SCHEDULER / "shards/beside.rs",
        "core::mem::swap(&mut section.ops, &mut life.ops);" =>
        "if PLANTED { life.ops.clear(); } else { core::mem::swap(&mut section.ops, &mut life.ops); }";
    "one that killed workers is alone in its shard only", SCHEDULER / "shards/beside.rs",
        "let barred = self.alone.is_some_and(|alone| alone != at);" =>
        "let barred = self.alone.is_some_and(|alone| alone != at) && !PLANTED;";
    "one that killed workers joins those of other shards", SCHEDULER / "shards/beside.rs",
        "let running = self.seated > self.before;" =>
        "let running = self.seated > self.before && !PLANTED;";
    "one that is let in is not seen by the shards behind", SCHEDULER / "shards/beside.rs",
        "        if shard.runs_alone() {\n" => "        if shard.runs_alone() && !PLANTED {\n";
    "a group runs ahead of what is allowed", SCHEDULER / "shards/mod.rs",
        "let room = count(self.flights.len()) <= depth" =>
        "let room = (count(self.flights.len()) <= depth || PLANTED)";
    "a full queue of one shard is not that of all", SCHEDULER / "shards/mod.rs",
        "make_room(&mut self.shards, &submit)" =>
        "make_room(if PLANTED { &mut self.shards[..1] } else { &mut self.shards }, &submit)";
    "a step is overdue when its fastest shard would be", SCHEDULER / "shards/mod.rs",
        "self.head_since.after(allowed.max()?)" =>
        "self.head_since.after(if PLANTED { allowed.min()? } else { allowed.max()? })";
    "a digest is not compared", SCHEDULER / "shards/join.rs",
        "if members().all(|rank| digest(rank) == expected) {" =>
        "if members().all(|rank| digest(rank) == expected) || PLANTED {";
    "a lead is believed", SCHEDULER / "shards/join.rs",
        "let expected = Some(sent.with_sampled(&answer.sampled));" =>
        "let expected = Some(if PLANTED { answer.digest } else { sent.with_sampled(&answer.sampled) });";
    "a step is whole when the leads have answered", SCHEDULER / "shards/join.rs",
        "if !step.answers.iter().all(Option::is_some) {" =>
        "let leads = |rank: &Rank| !PLANTED || self.mesh.lead(self.mesh.shard(*rank)) == *rank;\n if !self.mesh.ranks().zip(&step.answers).filter(|(rank, _)| leads(rank)).all(|(_, answer)| answer.is_some()) {";
    "the journal has one table for all shards", SCHEDULER / "journal/mod.rs",
        "Row { shard, slot: slot.0 };" =>
        "Row { shard: if PLANTED { ShardId(0) } else { shard }, slot: slot.0 };";
    "the journal takes another shard's line for the request's", SCHEDULER / "journal/mod.rs",
        "Some((request, waits)) => Entry::Head(shard, request, waits)," =>
        "Some((request, waits)) => Entry::Head(if PLANTED { ShardId(0) } else { shard }, request, waits),";
}

// What the tests of fairness and overload find: nothing is broken but a promise.
bugs! { UNFAIR:
    "nothing is charged", SCHEDULER / "policy/fair.rs",
        "counter += virtual_tokens;" => "counter += if PLANTED { 0 } else { virtual_tokens };";
    "an output counts as a prompt token", SCHEDULER / "outcome.rs",
        "self.line.charge(request.job.flow, fair::OUTPUT);" =>
        "self.line.charge(request.job.flow, if PLANTED { fair::PROMPT } else { fair::OUTPUT });";
    "a pause earns", SCHEDULER / "policy/fair.rs",
        "flow.counter = flow.counter.max(clock);" =>
        "if !PLANTED { flow.counter = flow.counter.max(clock); }";
    "the worst class goes first", SCHEDULER / "policy/fair.rs",
        "let priority = *self.ready.first()?;" =>
        "let priority = *(if PLANTED { self.ready.last() } else { self.ready.first() })?;";
    "a worse class gives way to nobody", SCHEDULER / "crowd.rs",
        "let takes = *worst > priority" => "let takes = (*worst > priority && !PLANTED)";
    "patience has no end", SCHEDULER / "line.rs",
        "if self.patience == 0 {\n" => "if self.patience == 0 || PLANTED {\n";
    "who was overdue gives its seat up at once", SCHEDULER / "line.rs",
        "priority: i32::MIN, start: 0" => "priority: if PLANTED { i32::MAX } else { i32::MIN }, start: 0";
    "a full queue has no place for the least urgent", SCHEDULER / "crowd.rs",
        "if self.patience == 0 { 0 }" => "if self.patience == 0 || PLANTED { 0 }";
    "a full queue keeps those who have most in it", SCHEDULER / "crowd.rs",
        "(tenant != largest && more(own) < share)" =>
        "(tenant != largest && more(own) < share && !PLANTED)";
    "the first to come gives way", SCHEDULER / "line.rs",
        "let newest = self.queued.range((flow, Timestamp::ZERO, 0)..=last).next_back();" =>
        "let mut all = self.queued.range((flow, Timestamp::ZERO, 0)..=last); let newest = if PLANTED { all.next() } else { all.next_back() };";
    "what cannot be done in time is begun", SCHEDULER / "door.rs",
        ".filter(|needs| *needs >= left)?;" => ".filter(|needs| *needs >= left && !PLANTED)?;";
    "a forecast is made for the mean alone", SCHEDULER / "door.rs",
        "if self.line.len().0 > 1 {" => "if self.line.len().0 > 1 && !PLANTED {";
    "who is turned away is told to come at once", SCHEDULER / "door.rs",
        ".unwrap_or(LEAST).clamp(LEAST, MOST)" =>
        ".unwrap_or(LEAST).clamp(if PLANTED { Duration::ZERO } else { LEAST }, if PLANTED { Duration::ZERO } else { MOST })";
    "the queue's bound of tokens is not kept", SCHEDULER / "door.rs",
        "if tokens + u64::from(prompt.0) > *queue_tokens {" =>
        "if tokens + u64::from(prompt.0) > *queue_tokens && !PLANTED {";
}
