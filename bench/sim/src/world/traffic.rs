//! Who comes and what they want: tenants whose sessions go on turn after turn, bursts, shared
//! documents, lengths with a long tail, every kind of limit.
//!
//! It does not know what becomes of a request. Invariant: what is drawn follows from the seed and
//! the session's number, time excepted, and no id is given twice.

use super::{Check, Happening, World, rank_of, token};
use crate::act::Act;
use crate::client::{Client, END};
use crate::rng::{Rng, chain};
use core::time::Duration;
use ids::{RequestId, TenantId, TokenId, Tokens};
use scheduler::{Event, FinishReason, Submit};
use step::Sampling;

/// Most turns of a session.
const TURNS: u64 = 12;
/// Sessions that come at once in a burst.
const BURST: u64 = 8;

/// One request of a session.
pub(super) struct Turn {
    session: u64,
    turn: u64,
    /// What was said before: prompts and answers.
    past: Vec<TokenId>,
}

impl Turn {
    fn request(&self) -> RequestId {
        RequestId(1 + self.session * TURNS + self.turn)
    }

    fn rng(&self, seed: u64) -> Rng {
        Rng::new(chain(chain(seed, self.session), self.turn))
    }
}

impl World {
    pub(super) fn arrive(&mut self, n: u64) -> Check {
        if !self.expects(Act::Arrive(n), Act::Arrive(u64::MAX)) {
            return Ok(());
        }
        let seed = self.scenario.seed;
        // Bursts are what fills queues: one block of arrivals in six comes at once.
        let burst = Rng::new(chain(seed, n / BURST)).one_in(6) && n % BURST != BURST - 1;
        let pause = self.scenario.pause.as_nanos() as u64;
        let wait = Act::Arrive(n).rng(seed).below(2 * pause);
        self.after(Duration::from_nanos(if burst { 0 } else { wait }), Happening::Arrive(n + 1));
        if !self.acts(Act::Arrive(n)) {
            return Ok(());
        }
        self.figures.sessions += 1;
        self.turn(Turn { session: n, turn: 0, past: Vec::new() })
    }

    pub(super) fn turn(&mut self, turn: Turn) -> Check {
        let mut rng = turn.rng(self.scenario.seed);
        let submit = self.make_request(&turn, &mut rng);
        let request = submit.request;
        let stop_at = rng.one_in(self.scenario.stops).then(|| {
            let at = 1 + rng.below_u32(30);
            (at, rng.below_u32(at + 1))
        });
        let abort = rng.one_in(self.scenario.aborts);
        let delay = Duration::from_micros(rng.below(1_500_000));
        let mut client = Client::new(submit.clone(), stop_at);
        if submit.deadline.is_some() {
            client.asked.push(FinishReason::Deadline);
        }
        self.unstarted.insert(rank_of(&client));
        self.clients.insert(request, client);
        self.figures.requests += 1;
        if abort {
            self.after(delay, Happening::Abort(request));
        }
        self.handle(Event::Submit(Box::new(submit)))
    }

    /// Whether every worker that runs the request dies of it.
    pub(super) fn poisons(&self, request: RequestId) -> bool {
        let session = (request.0 - 1) / TURNS;
        Act::Arrive(session).rng(self.scenario.seed ^ 0xBAD).one_in(self.scenario.poisons)
    }

    /// A turn ended as its client wished: there may be another.
    pub(super) fn goes_on(&mut self, client: &Client, output: usize) {
        let number = client.submit.request.0 - 1;
        let (session, turn) = (number / TURNS, number % TURNS);
        let mut rng = Act::Arrive(session).rng(self.scenario.seed ^ 0x7E57);
        // Half of the sessions have one turn, few have many.
        let turns = 1 + (rng.below(TURNS) * rng.below(TURNS) / TURNS) * rng.below(2);
        if turn + 1 >= turns {
            return;
        }
        let mut past = client.submit.prompt.to_vec();
        past.extend_from_slice(&client.expected()[..output]);
        let mut think = Turn { session, turn, past: Vec::new() }.rng(self.scenario.seed ^ 1);
        let wait = Duration::from_micros(think.below(400_000));
        self.after(wait, Happening::Turn(Turn { session, turn: turn + 1, past }));
    }

    fn make_request(&self, turn: &Turn, rng: &mut Rng) -> Submit {
        let scenario = &self.scenario;
        let mut who = Act::Arrive(turn.session).rng(scenario.seed ^ 0x7E4A);
        let tenant = who.below(scenario.tenants);
        let lengths = [1, 2, 63, 64, 65, 128, 300];
        let long_tail = |rng: &mut Rng, most: u32| {
            // The product of two uniform numbers: most are short.
            (u64::from(rng.below_u32(most)) * u64::from(rng.below_u32(most)) / u64::from(most))
                as u32
        };
        let mut prompt = turn.past.clone();
        if prompt.is_empty() {
            let len = match rng.below(4) {
                0 => lengths[rng.below(lengths.len() as u64) as usize],
                1 => 1 + rng.below_u32(scenario.prompt_most),
                _ => 1 + long_tail(rng, scenario.prompt_most),
            };
            let shared = &self.documents[rng.below(self.documents.len() as u64) as usize];
            let kept = if rng.one_in(3) { len } else { rng.below_u32(len + 1) } as usize;
            prompt.extend_from_slice(&shared[..kept.min(shared.len())]);
            while prompt.len() < len as usize {
                prompt.push(token(rng));
            }
        } else {
            let more = 1 + long_tail(rng, 80);
            prompt.extend((0..more).map(|_| token(rng)));
        }
        let key = &scenario.config.hash_key;
        let root = key.root(format!("tenant {tenant}").as_bytes());
        let mut hashes = key.chain_all(root, &prompt);
        if rng.one_in(5) {
            hashes.truncate(rng.below(hashes.len() as u64 + 1) as usize);
        }
        let sampling = Sampling { seed: rng.below(6), ..Sampling::default() };
        let deadline = rng.one_in(scenario.deadlines).then(|| {
            // No two at the same time, so that their order is no question.
            let most = if rng.one_in(2) { 200_000 } else { 2_000_000 };
            let micros = Duration::from_micros(1 + rng.below(most));
            self.now.after(micros + Duration::from_nanos(turn.request().0 % 1000))
        });
        let output_most = scenario.output_most;
        Submit {
            request: turn.request(),
            prompt: prompt.into(),
            prompt_hashes: hashes.into(),
            root,
            sampling: sampling.into(),
            max_tokens: Tokens(match rng.below(3) {
                0 => rng.below_u32(output_most),
                1 => output_most,
                _ => long_tail(rng, output_most),
            }),
            end_tokens: [END].into(),
            ignore_eos: rng.one_in(3),
            stop_tokens: if rng.one_in(8) { [TokenId(5)].into() } else { [].into() },
            prompt_logprobs: rng.one_in(scenario.prompt_logprobs).then_some(0),
            priority: rng.below(3) as i32,
            tenant: TenantId(if scenario.named { 1 + tenant } else { 0 }),
            deadline,
            arrival: self.now,
        }
    }
}
