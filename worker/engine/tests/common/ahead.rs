//! Steps enqueued before the tokens of those in front of them are known.

use super::{Model, Session, Setup, families, greedy, prompt};
use ids::{TokenId, Tokens};
use step::{Outcome, Sampling, StepPlan};

impl Session {
    /// Executes plans with up to `depth` of them in flight before another is enqueued, as far as the
    /// engine goes along. Returns their outcomes and how often one was enqueued behind another.
    pub fn drive(&mut self, plans: &[StepPlan], depth: usize) -> (Vec<Outcome>, usize) {
        let (mut outcomes, mut behind) = (Vec::new(), 0);
        for plan in plans {
            while self.engine.in_flight() > depth || !self.engine.accepts() {
                outcomes.extend(self.engine.collect().expect("a step"));
            }
            behind += usize::from(self.engine.in_flight() > 0);
            self.engine.enqueue(plan).expect("a plan that fits");
        }
        while let Some(outcome) = self.engine.collect().expect("a step") {
            outcomes.push(outcome);
        }
        (outcomes, behind)
    }
}

/// With counts and lists, which steps in flight change and read.
fn drawn(seed: u64) -> Sampling {
    Sampling {
        temperature: 0.9,
        top_p: 0.95,
        top_k: 40,
        seed,
        repetition_penalty: 1.2,
        frequency_penalty: 0.5,
        presence_penalty: 0.25,
        logit_bias: [(TokenId(3), 2.0), (TokenId(90), -5.0)].into(),
        min_tokens: Tokens(3),
        banned_before_min: [TokenId(7), TokenId(3)].into(),
        ..Sampling::default()
    }
}

/// Requests that come, end in the middle of what was planned, give their slot to another, and need
/// the host for a while: the same outcomes however far steps run ahead. Returns them.
pub fn run_ahead_changes_nothing(setup: Setup, runs_ahead: bool) -> Vec<Vec<(u32, u32)>> {
    let mut all = Vec::new();
    for (name, config) in families() {
        let model = Model::new(&config, 21);
        let run = |depth: usize| {
            let mut session = model.session(setup);
            let mut plans = Vec::new();
            session.admit(0, &prompt(70, 1), 70, Sampling::default());
            session.admit(1, &prompt(9, 2), 9, drawn(7));
            plans.push(session.plan(&[(0, 70), (1, 9)]));
            plans.extend((0..6).map(|_| session.plan(&[])));
            // It ended, and another takes its slot while steps that read the old one's are in flight.
            session.retire(1);
            session.admit(1, &prompt(130, 3), 130, drawn(8));
            plans.push(session.plan(&[(1, 65)]));
            plans.push(session.plan(&[(1, 65)]));
            plans.extend((0..4).map(|_| session.plan(&[])));
            session.admit(2, &prompt(20, 4), 20, greedy());
            plans.push(session.plan(&[(2, 20)]));
            plans.extend((0..3).map(|_| session.plan(&[])));
            session.retire(2);
            // Across a border of blocks.
            plans.extend((0..70).map(|_| session.plan(&[])));
            session.drive(&plans, depth)
        };
        let (alone, behind) = run(0);
        assert_eq!(behind, 0, "{name}: nothing runs ahead");
        for depth in [1, 2] {
            let (outcomes, behind) = run(depth);
            assert_eq!(
                behind > 60,
                runs_ahead,
                "{name}: {behind} steps were enqueued behind others"
            );
            for (at, (one, other)) in alone.iter().zip(&outcomes).enumerate() {
                assert_eq!(one.sampled, other.sampled, "{name} at {depth}, step {at}");
                assert_eq!(one.prompt_logprobs, other.prompt_logprobs, "{name}, step {at}");
                assert_eq!(one.digest, other.digest, "{name} at {depth}, step {at}");
            }
            assert_eq!(alone.len(), outcomes.len());
        }
        let sampled = alone.iter().flat_map(|outcome| &outcome.sampled);
        all.push(sampled.map(|one| (one.slot.0, one.token.0)).collect());
    }
    all
}
