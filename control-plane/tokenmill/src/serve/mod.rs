//! `tokenmill serve`: from a word on the command line to a server that answers.
//!
//! Decides what to serve and whether it fits, starts the supervisor, the driver's thread and the
//! gateway, and ends them in order. Invariant: nothing is allocated or started before the memory
//! plan was printed and fits.

mod absence;
mod bundled;
pub(crate) mod device;
mod driver;
mod gpu_state;
mod handle;
mod life;
mod member;
pub(crate) mod memory;
pub(crate) mod memory_plan;
mod offers;
mod plans;
mod settings;
pub(crate) mod source;
mod startup;
mod story;
mod streams;
mod supervise;
pub(crate) mod worker_config;

use crate::cli::ServeArgs;
use crate::first_words;
use crate::model_dir::ModelDir;
use crate::out::{say, unless_closed};
use anyhow::{Context, Result};
use driver::{Driver, Message};
use gateway::engine::Limits;
use gateway::{AppState, Gateway, GatewayLimits, ServedModel};
use handle::Handle;
use ids::{HashKey, Tokens};
use life::{Life, Progress, WorkerLimits};
use plans::Plans;
use scheduler::{Journal, Shards};
use settings::Settings;
use startup::Startup;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use supervise::Supervisor;
use telemetry::{Metrics, StartupPhase};
use text::TextFolder;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

/// Work without an ended step for this share (1/4) of the step time-out is a stall.
const PATIENCE_DIVISOR: u64 = 4;

/// Serves until a signal ends it. `command` is when the command began.
pub(crate) fn run(args: ServeArgs, command: Instant) -> Result<()> {
    let settings = Settings::decide(args)?;
    let runtime = tokio::runtime::Runtime::new().context("start the runtime")?;
    let served = runtime.block_on(serve(settings, command));
    // Connections that did not end in time are cut here.
    runtime.shutdown_timeout(Duration::from_millis(200));
    served
}

async fn serve(settings: Settings, command: Instant) -> Result<()> {
    let planned = command.elapsed();
    let address = SocketAddr::new(settings.args.host, settings.args.port);
    let listener = tokio::net::TcpListener::bind(address)
        .await
        .with_context(|| format!("listen on {address}; another --port may be free"))?;
    let address = listener.local_addr().context("ask for the address")?;
    if !address.ip().is_loopback() {
        tracing::warn!(%address, "listening beyond this machine without authentication");
    }
    // A broken tokenizer or template ends the command before a worker loads weights for nothing.
    let reading = Instant::now();
    let text = text_folder(&settings)?;
    let read = reading.elapsed();
    announce_plan(&settings)?;
    let (stop, stopped) = watch::channel(false);
    let engine = start_engine(&settings, stopped.clone(), command)?;
    engine.startup.took(StartupPhase::Plan, planned);
    engine.startup.took(StartupPhase::Text, read);
    let supervised = tokio::spawn(engine.supervisor.run());
    let app = app(&settings, text, engine.handle, engine.metrics)?;
    announce(&settings, address)?;
    if settings.is_demo() {
        tokio::spawn(prove(format!("http://{address}")));
    }
    let inbox = engine.inbox;
    let signals = async move {
        ended_by_signal().await;
        tracing::info!("stopping: no new requests, running ones may finish");
        inbox.send(Message::Drain);
    };
    let outcome = tokio::select! {
        served = gateway::serve(listener, app, signals) => served.context("serve HTTP"),
        ended = supervised => match ended {
            Ok(result) => result,
            Err(panic) => Err(anyhow::anyhow!("the supervisor failed: {panic}")),
        },
        Ok(panic) = engine.panic => Err(anyhow::anyhow!(
            "the scheduler panicked: {panic}; this is a defect, and whatever starts this server may start \
             it again"
        )),
    };
    let _ = stop.send(true);
    // The supervisor ends its worker before this process ends.
    tokio::time::sleep(Duration::from_millis(50)).await;
    outcome
}

struct Started {
    supervisor: Supervisor,
    handle: Handle,
    inbox: driver::Inbox,
    metrics: Arc<Metrics>,
    startup: Arc<Startup>,
    /// Hears what the scheduler's thread panicked with.
    panic: oneshot::Receiver<String>,
}

/// The driver's thread, and what the gateway and the supervisor need of it.
fn start_engine(
    settings: &Settings,
    stop: watch::Receiver<bool>,
    command: Instant,
) -> Result<Started> {
    let secret: [u8; 32] = rand_bytes()?;
    let hash_key = HashKey::derive(&settings.identity, &secret);
    let config = settings.scheduler(hash_key.clone());
    let scheduler = Shards::new(&config, settings.mesh.dp).context("set the scheduler up")?;
    let metrics = Arc::new(Metrics::new(&settings.names[0], crate::cli::VERSION));
    if let Some(device) = &settings.device {
        tracing::info!(device = device.name(), "serving on {device}");
        metrics.serves_on(device.name(), &device.to_string());
        if let Some(cuda) = &device.cuda {
            gpu_state::watch(&metrics, cuda.pci.clone());
        }
    }
    let startup = Arc::new(Startup::new(command, Arc::clone(&metrics)));
    let origin = Instant::now();
    let patience = Duration::from_secs((settings.args.step_timeout / PATIENCE_DIVISOR).max(5));
    let progress = Arc::new(Progress::new(patience));
    let (inbox, messages) = driver::inbox();
    let (kill_in, kill) = mpsc::channel(1);
    let limits = WorkerLimits {
        max_slots: settings.args.max_num_seqs,
        max_step_tokens: Tokens(settings.args.max_num_batched_tokens),
        max_context: settings.max_context,
    };
    let journal = match settings.args.journal_bytes {
        0 => None,
        bytes => {
            let bytes = usize::try_from(bytes).context("--journal-bytes is more than there is")?;
            let shards = u16::try_from(settings.mesh.dp).unwrap_or(u16::MAX);
            Some(Journal::new(bytes, settings.args.max_num_seqs, shards))
        }
    };
    let kept = journal.is_some();
    let driver = Driver {
        pressed: false,
        plans: Plans::default(),
        planted_panic: settings.args.panic_at_step,
        scheduler,
        journal,
        inbox: messages,
        life: Life::new(
            settings.mesh,
            limits,
            Arc::clone(&progress),
            Arc::clone(&startup),
            kill_in,
        ),
        progress: Arc::clone(&progress),
        metrics: Arc::clone(&metrics),
        startup: Arc::clone(&startup),
        origin,
    };
    let (panicked, panic) = oneshot::channel();
    std::thread::Builder::new()
        .name("scheduler".into())
        .spawn(move || {
            // Nothing of it is used after a panic; without it nothing can be served.
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| driver.run())) {
                let _ = panicked.send(worker::panic_text(panic.as_ref()).to_owned());
            }
        })
        .context("start the scheduler's thread")?;
    let handle = Handle {
        inbox: inbox.clone(),
        progress: Arc::clone(&progress),
        hash_key,
        limits: Limits { vocab: settings.vocab, max_context: settings.max_context },
        max_queued: (settings.args.max_queued_requests, settings.args.max_queued_tokens.into()),
        origin,
        next: AtomicU64::new(1),
        readers: kept.then(|| Arc::new(Semaphore::new(handle::READERS))),
    };
    let supervisor = Supervisor {
        mesh: settings.mesh,
        config: settings.worker(),
        program: std::env::current_exe().context("find this program")?,
        dial_suffix: settings.args.dial_suffix.clone().unwrap_or_default(),
        inbox: inbox.clone(),
        progress,
        startup: Arc::clone(&startup),
        kill,
        stop,
    };
    Ok(Started { supervisor, handle, inbox, metrics, startup, panic })
}

/// Bytes nobody can guess, from the operating system.
fn rand_bytes<const N: usize>() -> Result<[u8; N]> {
    use std::io::Read;
    let mut bytes = [0; N];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("read /dev/urandom")?;
    Ok(bytes)
}

fn app(
    settings: &Settings,
    text: TextFolder,
    handle: Handle,
    metrics: Arc<Metrics>,
) -> Result<AppState> {
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let model = ServedModel {
        names: settings.names.clone(),
        root: settings.dir.as_ref().map_or("fake".into(), |dir| dir.path.display().to_string()),
        created,
    };
    let own = GatewayLimits::default();
    let limits = GatewayLimits {
        drain: Duration::from_secs(settings.args.shutdown_timeout),
        write_stall: settings.args.write_stall_ms.map_or(own.write_stall, Duration::from_millis),
        ..own
    };
    // Without a configured seed nobody shall foresee one.
    let seed = match settings.args.seed {
        0 => u64::from_le_bytes(rand_bytes()?),
        seed => seed,
    };
    let version = crate::cli::VERSION.to_owned();
    let mut gateway = Gateway::new(Arc::new(handle), model, text, limits, metrics, seed, version);
    gateway.vllm_metric_names = true;
    gateway.admin_key = std::env::var("TOKENMILL_ADMIN_KEY").ok().filter(|key| !key.is_empty());
    Ok(Arc::new(gateway))
}

/// Tokenizer, template and defaults of the model's folder; a template file given by flag stands in
/// for the folder's own.
fn text_folder(settings: &Settings) -> Result<TextFolder> {
    let own = settings
        .args
        .chat_template
        .as_ref()
        .map(|file| {
            std::fs::read(file)
                .with_context(|| format!("read the chat template {}", file.display()))
        })
        .transpose()?;
    let folder = settings.dir.as_ref().map(|dir| dir.path.clone());
    let text = TextFolder::from_files(|name| match (&folder, &own) {
        (_, Some(template)) if name == "chat_template.jinja" => Ok(Some(template.clone())),
        (Some(folder), _) => TextFolder::read(folder, name),
        (None, _) => Ok(None),
    })
    .context("read the model's tokenizer and template")?;
    gateway::check_defaults(&text.generation).with_context(|| {
        let folder = folder.unwrap_or_default();
        format!("{} holds defaults that no request could ask for", folder.display())
    })?;
    Ok(text)
}

fn announce_plan(settings: &Settings) -> Result<()> {
    settings.plan.as_ref().map_or(Ok(()), |plan| unless_closed(say!("{plan}")))
}

fn announce(settings: &Settings, address: SocketAddr) -> Result<()> {
    unless_closed(say!("{} on http://{address}", settings.names[0]))
}

/// Streams one completion from the running server: proof that the whole path works.
async fn prove(url: String) {
    let Ok(client) = first_words::ready(&url).await else { return };
    let first = async {
        say!("\n$ curl {url}/v1/completions -d '{}'", first_words::body(client.model()))?;
        first_words::stream(&client).await
    };
    if let Err(error) = unless_closed(first.await) {
        tracing::error!("the first completion failed: {error:#}");
    }
    let _ = say!("\nTalk to it with `tokenmill chat`; Ctrl-C ends the server.");
}

/// Returns at the first SIGINT or SIGTERM; a second one ends the process at once.
async fn ended_by_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        tracing::warn!("a second signal: ending now");
        std::process::exit(130);
    });
}

/// Reads what a folder, recipe or repository needs of the hub, with progress.
fn fetched(repo: &str, revision: &str) -> Result<PathBuf> {
    crate::model_cmd::fetch(repo, revision)
}

/// The model folder of a source that has one.
fn folder_of(source: &source::Source, revision: &str) -> Result<PathBuf> {
    match source {
        source::Source::Bundled => bundled::folder(),
        source::Source::Folder(path) => Ok(path.clone()),
        source::Source::Hub(repo) => fetched(repo, revision),
        source::Source::Recipe(name) => anyhow::bail!("recipe {name} names another recipe"),
    }
}

/// Reads the configuration of a folder.
fn read_dir(path: &Path) -> Result<ModelDir> {
    ModelDir::read(path)
}
