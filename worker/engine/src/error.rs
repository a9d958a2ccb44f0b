//! Why an engine refuses: a model it cannot hold, a configuration that does not fit, a plan that
//! contradicts its state, a device that fails. After a [`StepError`] the engine's state is not to be
//! trusted.

use device::collectives::CollectiveError;
use device::cuda::CudaError;
use ids::{BlockId, Bytes, GroupId, RequestId, SlotGeneration, SlotId, StepSeq, TierSlot, Tokens};

/// A weight that is not as the program needs it.
#[derive(Debug, thiserror::Error)]
pub enum WeightError {
    /// It was not loaded.
    #[error("weight {name} was not loaded")]
    Absent {
        /// Name in the checkpoint.
        name: String,
    },
    /// Another shape than the configuration implies.
    #[error("weight {name} has shape {got:?}, config.json implies {wanted:?}")]
    Shape {
        /// Name in the checkpoint.
        name: String,
        /// Its shape.
        got: Vec<usize>,
        /// What the program needs.
        wanted: Vec<usize>,
    },
    /// A random matrix that only a device can make.
    #[error("weight {name} is random and was not made in memory; the processor needs it there")]
    NotMade {
        /// Name in the checkpoint.
        name: String,
    },
    /// Its file cannot be read.
    #[error("weight {name} cannot be read from {}", path.display())]
    Read {
        /// Name in the checkpoint.
        name: String,
        /// The file.
        path: std::path::PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A vector where the program has a matrix, or the other way round; a mistake in a model file.
    #[error("weight {name} is not used as it was declared")]
    Kind {
        /// Name in the checkpoint.
        name: String,
    },
}

/// Why an engine cannot be built or configured.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A weight.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// The device.
    #[error(transparent)]
    Device(#[from] CudaError),
    /// A program for several ranks where one is executed alone.
    #[error(
        "this program is lowered for {ranks} ranks, which need collectives and run on the processor; \
         a CUDA device runs one"
    )]
    Ranks {
        /// Ranks of the mesh.
        ranks: usize,
    },
    /// Collectives of another rank or mesh than the program was lowered for.
    #[error(
        "collectives of rank {got} of {got_of} for a program lowered for rank {rank} of {ranks}"
    )]
    OtherRank {
        /// Of the collectives.
        got: usize,
        /// Likewise.
        got_of: usize,
        /// Of the program.
        rank: usize,
        /// Likewise.
        ranks: usize,
    },
    /// A carving that does not fit the cache or the groups.
    #[error("carving: {0}")]
    Carving(String),
    /// A limit of the configuration that cannot be met.
    #[error("{what} = {got} must be {allowed}")]
    Limit {
        /// Field of the configuration.
        what: &'static str,
        /// Its value.
        got: u64,
        /// What would be accepted.
        allowed: String,
    },
    /// Not enough memory for what the configuration needs.
    #[error("cannot allocate {bytes} bytes for {what}")]
    Memory {
        /// What for.
        what: &'static str,
        /// How much.
        bytes: Bytes,
    },
}

/// Why a step failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// The plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The device.
    #[error("{during} of step {step}, {rows} rows of {requests} requests, failed on the device")]
    Device {
        /// Which part of the step.
        during: &'static str,
        /// Which step.
        step: StepSeq,
        /// Its tokens.
        rows: usize,
        /// Its requests.
        requests: usize,
        /// What the device said; of an earlier launch where the call only waited.
        source: CudaError,
    },
    /// The ranks.
    #[error("step {step} failed between ranks")]
    Collective {
        /// Which step.
        step: StepSeq,
        /// Who is missing, or what else.
        source: CollectiveError,
    },
}

/// What of a plan or upload contradicts the engine's state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Nothing was configured yet.
    #[error("a command came before the configuration")]
    NotConfigured,
    /// Another life.
    #[error("the command is for incarnation {got}, this engine lives in {lives}")]
    Incarnation {
        /// Named.
        got: u64,
        /// Lived.
        lives: u64,
    },
    /// A step out of order.
    #[error("step {got} follows step {last}")]
    Sequence {
        /// Named.
        got: StepSeq,
        /// The last executed.
        last: StepSeq,
    },
    /// A plan without a section, or a number of tokens, for each shard.
    #[error(
        "the plan has {got} sections and {tokens} numbers of tokens, this engine is a shard of {shards}"
    )]
    Sections {
        /// Sections.
        got: usize,
        /// Numbers of tokens.
        tokens: usize,
        /// Shards of the mesh.
        shards: usize,
    },
    /// Tokens of a shard that are not those of its section.
    #[error("the plan names {named} tokens of shard {shard}, its section has {got}")]
    ShardTokens {
        /// The shard.
        shard: usize,
        /// In the header.
        named: Tokens,
        /// In the section.
        got: usize,
    },
    /// Rows too few for a shard.
    #[error("a step of {rows} padded rows for {tokens} tokens of a shard")]
    Bucket {
        /// Of the plan, as far as the configuration allows.
        rows: usize,
        /// Of the largest shard.
        tokens: usize,
    },
    /// Tokens that do not continue what was uploaded.
    #[error("upload of {request} starts at {offset}, {held} tokens are held")]
    UploadGap {
        /// Whose.
        request: RequestId,
        /// Where it starts.
        offset: Tokens,
        /// What is held.
        held: Tokens,
    },
    /// A token outside of the vocabulary.
    #[error("upload of {request} holds token {token}, the vocabulary has {vocab}")]
    UnknownToken {
        /// Whose.
        request: RequestId,
        /// The token.
        token: u32,
        /// Entries.
        vocab: u32,
    },
    /// An admission whose tokens are not here.
    #[error("{request} is admitted with {known} tokens, {held} were uploaded")]
    NotUploaded {
        /// Whose.
        request: RequestId,
        /// Named.
        known: Tokens,
        /// Held.
        held: Tokens,
    },
    /// A plan while steps are in flight that nothing may be enqueued behind.
    #[error("plan {got} came before the tokens that it depends on; the last plan was {last}")]
    TooFarAhead {
        /// Named.
        got: StepSeq,
        /// Taken last.
        last: StepSeq,
    },
    /// One step alone was asked for.
    #[error("a step is to be executed alone while {in_flight} are in flight")]
    InFlight {
        /// Enqueued, not collected.
        in_flight: usize,
    },
    /// A slot outside of the table.
    #[error("slot {slot} is outside of the table of {slots}")]
    NoSlot {
        /// Named.
        slot: SlotId,
        /// Rows.
        slots: usize,
    },
    /// A slot that is free.
    #[error("slot {slot} is not admitted")]
    NotAdmitted {
        /// Named.
        slot: SlotId,
    },
    /// A slot admitted twice.
    #[error("slot {slot} is admitted while {request} lives in it")]
    Occupied {
        /// Named.
        slot: SlotId,
        /// Who lives there.
        request: RequestId,
    },
    /// A generation that is not newer than the last.
    #[error("slot {slot} is admitted with generation {got} after {last}")]
    StaleGeneration {
        /// Named.
        slot: SlotId,
        /// Named.
        got: SlotGeneration,
        /// The last.
        last: SlotGeneration,
    },
    /// A cache group the model does not have.
    #[error("cache group {0} does not exist")]
    NoGroup(GroupId),
    /// A block outside of the cache.
    #[error("block {block} of group {group} is outside of the cache")]
    NoBlock {
        /// Group.
        group: GroupId,
        /// Block.
        block: BlockId,
    },
    /// A place outside of the memory behind the cache.
    #[error("place {at} of group {group} is outside of the {places} behind the cache")]
    NoPlace {
        /// Group.
        group: GroupId,
        /// The place.
        at: TierSlot,
        /// Places of each group.
        places: u32,
    },
    /// Numbers of an admission that contradict each other.
    #[error("slot {slot}: {what}")]
    Admission {
        /// Named.
        slot: SlotId,
        /// Which numbers.
        what: &'static str,
    },
    /// More blocks than the longest context has.
    #[error("slot {slot} has more blocks in group {group} than the longest context")]
    TableFull {
        /// Named.
        slot: SlotId,
        /// Group.
        group: GroupId,
    },
    /// Tokens without a block to write to.
    #[error("slot {slot} would reach {reach} tokens, group {group} has room for {room}")]
    NoRoom {
        /// Named.
        slot: SlotId,
        /// Group.
        group: GroupId,
        /// Tokens after the step.
        reach: Tokens,
        /// Tokens that the blocks hold.
        room: Tokens,
    },
    /// A read of blocks that were given up.
    #[error("slot {slot} would read block {needed} of group {group}, live ones start at {live}")]
    Trimmed {
        /// Named.
        slot: SlotId,
        /// Group.
        group: GroupId,
        /// First logical block read.
        needed: u32,
        /// First logical block kept.
        live: u32,
    },
    /// A chunk that is empty, too long, or samples in the middle.
    #[error("slot {slot}: a chunk of {tokens} after {computed} of {known} tokens{}", if *sample { ", sampling" } else { "" })]
    Chunk {
        /// Named.
        slot: SlotId,
        /// Chunk.
        tokens: Tokens,
        /// Tokens with KV.
        computed: Tokens,
        /// Tokens known.
        known: Tokens,
        /// Whether it samples.
        sample: bool,
    },
    /// A slot in two runs of a step.
    #[error("slot {slot} runs twice in one step")]
    RunsTwice {
        /// Named.
        slot: SlotId,
    },
    /// A slot that decodes before its prompt is done.
    #[error("slot {slot} decodes with {computed} of {known} tokens computed")]
    NotReady {
        /// Named.
        slot: SlotId,
        /// Tokens with KV.
        computed: Tokens,
        /// Tokens known.
        known: Tokens,
    },
    /// A join of a slot in the set, or a leave of one outside.
    #[error("slot {slot} is {} the decode set", if *inside { "already in" } else { "not in" })]
    DecodeSet {
        /// Named.
        slot: SlotId,
        /// Whether it is in the set.
        inside: bool,
    },
    /// More tokens than the configuration allows.
    #[error("a step of {got} tokens, at most {limit} are configured")]
    TooManyTokens {
        /// Planned.
        got: usize,
        /// Configured.
        limit: usize,
    },
}
