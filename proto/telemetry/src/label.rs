//! Label values. Closed sets: a new value is a new variant.

macro_rules! label {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        pub enum $name { $($(#[$variant_doc])* $variant),+ }

        impl $name {
            /// Every value.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// As it stands in the metric.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }
    };
}

label! {
    /// Where a request came in.
    Door {
        /// `POST /v1/completions`
        Completions = "completions",
        /// `POST /v1/chat/completions`
        Chat = "chat_completions",
        /// `GET /v1/models` and below
        Models = "models",
        /// `POST /tokenize`
        Tokenize = "tokenize",
        /// `POST /detokenize`
        Detokenize = "detokenize",
        /// Health, version and metrics
        Operations = "operations",
        /// Anything else: unknown paths, unknown methods
        Other = "other",
    }
}

label! {
    /// Status of a reply, by its first digit.
    StatusClass {
        /// 1xx to 3xx
        Success = "2xx",
        /// 4xx
        Client = "4xx",
        /// 5xx
        Server = "5xx",
    }
}

impl StatusClass {
    /// The class of a status code.
    #[must_use]
    pub const fn of(status: u16) -> Self {
        match status {
            0..=399 => Self::Success,
            400..=499 => Self::Client,
            _ => Self::Server,
        }
    }
}

label! {
    /// What decided on which data-parallel shard a request runs.
    PlacedBy {
        /// The most of its prompt was cached there
        Prefix = "prefix",
        /// The least was to be done there, and no shard had more of its prompt cached
        Load = "load",
        /// Where more of its prompt was cached too much was to be done
        LoadOverPrefix = "load_over_prefix",
    }
}

label! {
    /// How a generation ended.
    FinishedBy {
        /// An end token, a stop token or a stop string
        Stop = "stop",
        /// As many tokens as were asked for
        Length = "length",
        /// The client went away, or stopped reading
        Abort = "abort",
        /// A failure
        Error = "error",
    }
}

label! {
    /// Why a request was not admitted.
    RefusedBy {
        /// A field is wrong
        Validation = "validation",
        /// The queue is full
        QueueFull = "queue_full",
        /// It gave its place in a full queue to another
        Shed = "shed",
        /// Its deadline was out of reach
        Deadline = "deadline",
        /// No worker serves
        NotReady = "not_ready",
        /// It can never fit
        TooLarge = "too_large",
    }
}

label! {
    /// Steps in flight when another was planned.
    StepsAhead {
        /// None: the plan knows every result
        Zero = "0",
        /// One
        One = "1",
        /// Two, the most that may be
        Two = "2",
    }
}

impl StepsAhead {
    /// The label of a number of steps.
    #[must_use]
    pub const fn of(steps: u32) -> Self {
        match steps {
            0 => Self::Zero,
            1 => Self::One,
            _ => Self::Two,
        }
    }
}

label! {
    /// A part of the start, in order; the last two are sums.
    StartupPhase {
        /// From the command to a memory plan that fits
        Plan = "plan",
        /// Tokenizer and template are read
        Text = "text",
        /// The worker's process is started and its session opened
        Worker = "worker",
        /// The device is opened
        Device = "device",
        /// Its kernels are loaded
        Kernels = "kernels",
        /// Weights are read, or made
        Weights = "weights",
        /// Memory of steps and cache is allocated
        Memory = "memory",
        /// Steps are captured into graphs
        Graphs = "graphs",
        /// From the command until requests are served
        Ready = "ready",
        /// From the command to the first token of all
        FirstToken = "first_token",
    }
}

label! {
    /// What a step ran.
    StepKind {
        /// A token each of requests that decode
        Decode = "decode",
        /// Prompt tokens
        Prefill = "prefill",
        /// Both
        Mixed = "mixed",
    }
}

impl StepKind {
    /// The kind of a step of so many tokens, prompt tokens among them.
    #[must_use]
    pub const fn of(tokens: u32, prefill: u32) -> Self {
        match prefill {
            0 => Self::Decode,
            _ if prefill == tokens => Self::Prefill,
            _ => Self::Mixed,
        }
    }
}

label! {
    /// What holds a KV block.
    BlockState {
        /// A live request
        Used = "used",
        /// The prefix index alone
        Cached = "cached",
        /// Launched steps
        Limbo = "limbo",
        /// Nothing
        Free = "free",
    }
}

label! {
    /// A clock of a device.
    Clock {
        /// Of the multiprocessors
        Multiprocessors = "sm",
        /// Of the memory
        Memory = "memory",
    }
}

label! {
    /// Why a device runs slower than it could.
    Throttling {
        /// Its power limit
        Power = "power",
        /// Temperature, by the driver's control
        Thermal = "thermal",
        /// A protection of the hardware
        Hardware = "hardware",
    }
}

label! {
    /// An error of a device's memory.
    EccError {
        /// It was corrected
        Corrected = "corrected",
        /// It could not be
        Uncorrected = "uncorrected",
    }
}
