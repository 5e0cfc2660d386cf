//! A migration under way is seen and steered from other processes: HTTP with JSON under `/v1` on `migrate.sock` in the VM's run folder, served
//! by the manager at the source. Both ends of it.
//!
//! Control plane: tokio, on one thread of its own; nothing that moves pages waits for it. Whoever connects may be hostile or broken:
//! connections are few, each has one request and a second for it. Must not know how a migration is done.

use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use axum::extract::{Extension, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::Deserialize;
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, watch};

use super::audit::{self, Action};
use super::control::{Caller, ControlError, Outcome, answer, ask_throttles, blocking, forbidden, request, within};
use super::progress::Progress;
use super::registry::{Registry, RegistryError};
use crate::migrate::CancelFlag;
use crate::model::schema::Schema;
use crate::model::{BytesPerSecond, MigrationReport, MigrationStatus, PAGE_SIZE, VmRef};

/// The socket's name in the VM's folder.
const SOCKET: &str = "migrate";
/// Only the manager's user, and root.
const SOCKET_MODE: u32 = 0o600;
/// Connections that are served at a time; others wait.
const MOST_CONNECTIONS: u32 = 64;
/// How long a request may take to come.
const REQUEST_LIMIT: Duration = Duration::from_secs(1);
/// How long the last answers may hold up the manager's end.
const LAST_ANSWERS_LIMIT: Duration = Duration::from_secs(2);
/// How long the VM's process may take to say how its writers are slowed.
const THROTTLE_LIMIT: Duration = Duration::from_millis(500);
/// How long a manager may take to answer anything but a cancel.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// What is needed to steer a migration.
#[derive(Clone, Debug)]
pub struct Steered {
    /// How far it is.
    pub progress: Arc<Progress>,
    /// Stops it.
    pub cancel: CancelFlag,
    /// Where actions are recorded.
    pub state_dir: PathBuf,
    /// Its page streams.
    pub streams: u16,
    /// The VM's own socket, if it is to be asked how its writers are slowed.
    pub throttle: Option<PathBuf>,
}

impl Steered {
    fn record(&self, who: String, what: &str, before: String, after: String, result: &str) {
        let vm_id = self.progress.plan().vm_id;
        audit::record(&self.state_dir, &Action { who, what, vm_id, before, after, result: result.to_owned() });
    }

    fn set_bandwidth(&self, who: String, limit: Option<BytesPerSecond>) -> Result<(), String> {
        // With less the peer would take the streams for stalled.
        let least = BytesPerSecond(u64::from(self.streams.max(1)) * PAGE_SIZE as u64);
        if let Some(limit) = limit.filter(|limit| *limit < least) {
            return Err(format!(
                "{limit} is less than a page a second for each of {} streams; allow more",
                self.streams
            ));
        }
        if self.progress.ended().borrow().is_some() {
            return Err("the migration has ended".to_owned());
        }
        let show = |limit: Option<BytesPerSecond>| {
            limit.map_or_else(|| "no bandwidth limit".to_owned(), |limit| format!("{} bytes per second", limit.0))
        };
        let before = self.progress.limit();
        self.progress.set_limit(limit);
        self.record(who, "set-migration-bandwidth", show(before), show(limit), "ok");
        Ok(())
    }

    fn finish(&self, who: String) -> Result<(), String> {
        if self.progress.ended().borrow().is_some() {
            return Err("the migration has ended".to_owned());
        }
        if !self.progress.finish() {
            return Err("nothing of it waits until it is asked for: only demand-paging has to be finished".to_owned());
        }
        self.record(who, "finish-migration", "pages wait until asked for".to_owned(), "all pages go".to_owned(), "ok");
        Ok(())
    }

    fn cancel(&self, who: String) -> Result<(), String> {
        let status = self.progress.status();
        if !status.can_be_cancelled {
            let error = format!(
                "it is too late to cancel: at step `{}` the VM is the target's already, past the point of no return",
                status.step
            );
            self.record(who, "cancel-migration", status.step.to_string(), status.step.to_string(), &error);
            return Err(error);
        }
        self.cancel.set();
        self.record(who, "cancel-migration", status.step.to_string(), "cancelling".to_owned(), "ok");
        Ok(())
    }
}

#[derive(Deserialize)]
struct Bandwidth {
    /// Without it there is to be no limit.
    bytes_per_second: Option<u64>,
}

async fn status(State(steered): State<Arc<Steered>>) -> Response {
    let mut status = steered.progress.status();
    if let Some(socket) = steered.throttle.clone() {
        let asked = tokio::task::spawn_blocking(move || ask_throttles(vec![socket], THROTTLE_LIMIT).pop().flatten());
        status.throttle = asked.await.ok().flatten();
    }
    Json(status.tagged()).into_response()
}

async fn bandwidth(
    State(steered): State<Arc<Steered>>,
    Extension(caller): Extension<Caller>,
    Query(Bandwidth { bytes_per_second }): Query<Bandwidth>,
) -> Response {
    answer(steered.set_bandwidth(caller.name(), bytes_per_second.map(BytesPerSecond)))
}

async fn finish(State(steered): State<Arc<Steered>>, Extension(caller): Extension<Caller>) -> Response {
    answer(steered.finish(caller.name()))
}

/// Answers when the migration has ended, with its report.
async fn cancel(State(steered): State<Arc<Steered>>, Extension(caller): Extension<Caller>) -> Response {
    if let Err(error) = steered.cancel(caller.name()) {
        return answer(Err(error));
    }
    let mut ended = steered.progress.ended();
    let report = ended.wait_for(Option::is_some).await.ok().and_then(|report| (*report).clone());
    match report {
        Some(report) => Json(report.tagged()).into_response(),
        None => answer(Err("the manager ended without a report".to_owned())),
    }
}

fn router(steered: Arc<Steered>, caller: Caller) -> Router {
    if !caller.may_act() {
        return Router::new().fallback(move || {
            let caller = caller.clone();
            async move { forbidden(&caller) }
        });
    }
    let nothing = || async {
        let error = "there is GET /v1/migration, POST /v1/cancel, POST /v1/bandwidth and POST /v1/finish".to_owned();
        (StatusCode::NOT_FOUND, Json(Outcome { error }.tagged())).into_response()
    };
    Router::new()
        .route("/v1/migration", get(status))
        .route("/v1/bandwidth", post(bandwidth))
        .route("/v1/cancel", post(cancel))
        .route("/v1/finish", post(finish))
        .fallback(nothing)
        .layer(Extension(caller))
        .with_state(steered)
}

/// A migration's socket while it is served; its file goes when this is dropped.
#[derive(Debug)]
pub struct Served {
    path: PathBuf,
    inode: u64,
    ending: watch::Sender<bool>,
    ended: mpsc::Receiver<()>,
}

impl Drop for Served {
    /// Takes no more requests, and returns when those that are being answered have their answer, or two seconds later.
    fn drop(&mut self) {
        // Another manager may have begun to serve the same name.
        if std::fs::metadata(&self.path).is_ok_and(|file| file.ino() == self.inode) {
            let _gone_with_its_folder = std::fs::remove_file(&self.path);
        }
        self.ending.send_replace(true);
        if self.ended.recv_timeout(LAST_ANSWERS_LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
            tracing::warn!("a request is still unanswered after {LAST_ANSWERS_LIMIT:?}");
        }
    }
}

/// Serves a migration at `path` until what it returns is dropped. Only who has the VM's session may: a socket that is there is then one of a
/// manager that was killed, and gives way.
///
/// # Errors
/// A socket that cannot be made.
pub fn serve(path: &Path, steered: Steered) -> io::Result<Served> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = {
        let _context = runtime.enter();
        UnixListener::bind(path)?
    };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE))?;
    let inode = std::fs::metadata(path)?.ino();
    let (ending, at_end) = watch::channel(false);
    let (end, ended) = mpsc::channel();
    let work = answer_all(listener, Arc::new(steered), at_end);
    std::thread::Builder::new().name("steering".into()).spawn(move || {
        runtime.block_on(work);
        // A question that hangs in another thread holds nobody up.
        runtime.shutdown_background();
        let _nobody_waits = end.send(());
    })?;
    Ok(Served { path: path.to_owned(), inode, ending, ended })
}

async fn answer_all(listener: UnixListener, steered: Arc<Steered>, mut at_end: watch::Receiver<bool>) {
    let room = Arc::new(Semaphore::new(MOST_CONNECTIONS as usize));
    let accepting = async {
        loop {
            let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::debug!("migrate.sock: {error}");
                    tokio::time::sleep(REQUEST_LIMIT).await;
                    continue;
                }
            };
            let service = TowerToHyperService::new(router(Arc::clone(&steered), Caller::of(&stream)));
            tokio::spawn(async move {
                let mut connection = hyper::server::conn::http1::Builder::new();
                connection.timer(TokioTimer::new()).header_read_timeout(REQUEST_LIMIT).keep_alive(false);
                if let Err(error) = connection.serve_connection(TokioIo::new(stream), service).await {
                    tracing::debug!("migrate.sock: {error}");
                }
                drop(place);
            });
        }
    };
    let end = async { drop(at_end.wait_for(|&end| end).await) };
    tokio::select! {
        () = accepting => {}
        () = end => {}
    }
    drop(listener);
    let _in_time = tokio::time::timeout(LAST_ANSWERS_LIMIT / 2, room.acquire_many(MOST_CONNECTIONS)).await;
}

/// A migration that could not be seen or steered.
#[derive(Debug, thiserror::Error)]
pub enum SteerError {
    /// No such VM.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The VM is not migrated.
    #[error("no migration of `{0}` runs on this host; `dunlin migrate {0} --to ADDRESS` begins one")]
    NoMigration(String),
    /// The manager says no.
    #[error("{0}")]
    Refused(String),
    /// The manager cannot be asked, or does not answer.
    #[error("{0}; is its manager stopped, or was it killed?")]
    Exchange(String),
}

impl From<ControlError> for SteerError {
    fn from(error: ControlError) -> Self {
        match error {
            ControlError::Refused(error) => Self::Refused(error),
            ControlError::Exchange { .. } => Self::Exchange(error.to_string()),
        }
    }
}

/// The socket of the migration of a VM, if somebody serves it.
fn socket(run_dir: &Path, vm: &VmRef) -> Result<PathBuf, SteerError> {
    let registry = Registry::new(run_dir);
    let entry = registry.find(vm)?;
    let path = registry.socket(&entry.name, SOCKET);
    match UnixStream::connect(&path) {
        Ok(_) => Ok(path),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            Err(SteerError::NoMigration(entry.name.to_string()))
        }
        Err(error) => Err(SteerError::Exchange(format!("{}: {error}", path.display()))),
    }
}

fn read<T: serde::de::DeserializeOwned>(socket: &Path, body: &[u8]) -> Result<T, SteerError> {
    serde_json::from_slice(body)
        .map_err(|error| SteerError::Exchange(format!("{}: an answer that is none ({error})", socket.display())))
}

/// How far the migration of a VM is.
///
/// # Errors
/// There is none, or its manager does not answer.
pub fn ask_status(run_dir: &Path, vm: &VmRef) -> Result<MigrationStatus, SteerError> {
    let path = socket(run_dir, vm)?;
    let (_, body) = within(&path, ANSWER_LIMIT, request(&path, "GET", "/v1/migration", "text/plain", Vec::new()))?;
    read(&path, &body)
}

/// Limits what the migration of a VM may send from now on.
///
/// # Errors
/// There is none, it has ended, or its manager does not answer.
pub fn set_bandwidth(run_dir: &Path, vm: &VmRef, limit: Option<BytesPerSecond>) -> Result<(), SteerError> {
    let path = socket(run_dir, vm)?;
    let target = limit.map_or_else(String::new, |limit| format!("?bytes_per_second={}", limit.0));
    let target = format!("/v1/bandwidth{target}");
    within(&path, ANSWER_LIMIT, request(&path, "POST", &target, "text/plain", Vec::new()))?;
    Ok(())
}

/// Has the migration of a VM send what its target has not asked for.
///
/// # Errors
/// There is none, it has ended, nothing of it waits, or its manager does not answer.
pub fn finish_migration(run_dir: &Path, vm: &VmRef) -> Result<(), SteerError> {
    let path = socket(run_dir, vm)?;
    within(&path, ANSWER_LIMIT, request(&path, "POST", "/v1/finish", "text/plain", Vec::new()))?;
    Ok(())
}

/// Cancels the migration of a VM, and waits until it has ended; says how.
///
/// # Errors
/// There is none, it is too late, or its manager is gone.
pub fn cancel_migration(run_dir: &Path, vm: &VmRef) -> Result<MigrationReport, SteerError> {
    let path = socket(run_dir, vm)?;
    let (_, body) = blocking(request(&path, "POST", "/v1/cancel", "text/plain", Vec::new()))?;
    read(&path, &body)
}

/// Where the socket of a VM's migration is.
pub(super) fn path(registry: &Registry, name: &crate::model::id::VmName) -> PathBuf {
    registry.socket(name, SOCKET)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::time::Instant;

    use super::*;
    use crate::migrate::Observer;
    use crate::model::Step;
    use crate::service::progress::tests::begun;

    struct Stage {
        folder: tempfile::TempDir,
        steered: Steered,
        served: Option<Served>,
    }

    impl Stage {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let steered = Steered {
                progress: Arc::new(begun(Some(BytesPerSecond(12_500_000)))),
                cancel: CancelFlag::default(),
                state_dir: folder.path().to_owned(),
                streams: 2,
                throttle: None,
            };
            let served = Some(serve(&folder.path().join("s"), steered.clone()).unwrap());
            Self { folder, steered, served }
        }

        fn path(&self) -> PathBuf {
            self.folder.path().join("s")
        }

        fn ask(&self, method: &str, target: &str) -> Result<Vec<u8>, ControlError> {
            ask(&self.path(), method, target)
        }

        fn audit(&self) -> String {
            std::fs::read_to_string(self.folder.path().join("audit.log")).unwrap_or_default()
        }
    }

    fn ask(path: &Path, method: &str, target: &str) -> Result<Vec<u8>, ControlError> {
        within(path, Duration::from_secs(60), request(path, method, target, "text/plain", Vec::new()))
            .map(|(_, body)| body.to_vec())
    }

    #[test]
    fn it_is_seen_and_its_limit_changed() {
        let stage = Stage::new();
        stage.steered.progress.step(Step::Round, "");
        let status: MigrationStatus = serde_json::from_slice(&stage.ask("GET", "/v1/migration").unwrap()).unwrap();
        assert_eq!((status.step, status.bandwidth_bytes_per_second), (Step::Round, Some(12_500_000)));
        stage.ask("POST", "/v1/bandwidth?bytes_per_second=25000000").unwrap();
        assert_eq!(stage.steered.progress.limit(), Some(BytesPerSecond(25_000_000)));
        stage.ask("POST", "/v1/bandwidth").unwrap();
        assert_eq!(stage.steered.progress.limit(), None);
        let refused = stage.ask("POST", "/v1/bandwidth?bytes_per_second=8191").unwrap_err().to_string();
        assert!(refused.contains("less than a page"), "{refused}");
        assert!(stage.ask("POST", "/v1/bandwidth?bytes_per_second=-1").is_err());
        assert!(stage.ask("POST", "/v1/nonsense").unwrap_err().to_string().contains("POST /v1/cancel"));
        assert_eq!(stage.steered.progress.limit(), None);
        assert_eq!(stage.audit().matches("set-migration-bandwidth").count(), 2, "{}", stage.audit());
    }

    #[test]
    fn a_cancel_waits_for_the_end_and_says_how_it_ended() {
        let mut stage = Stage::new();
        let report = crate::service::reports::tests::sample();
        std::thread::scope(|scope| {
            let path = stage.path();
            let asking = scope.spawn(move || ask(&path, "POST", "/v1/cancel").unwrap());
            while !stage.steered.cancel.is_set() {
                std::thread::yield_now();
            }
            assert!(!asking.is_finished());
            stage.steered.progress.end(report.clone());
            let answer: MigrationReport = serde_json::from_slice(&asking.join().unwrap()).unwrap();
            assert_eq!(answer, report);
        });
        let late = stage.ask("POST", "/v1/cancel").unwrap_err().to_string();
        assert!(late.contains("too late"), "{late}");
        // The answer is there though the manager ends at once.
        stage.served = None;
        assert!(!stage.path().exists());
    }

    #[test]
    fn past_the_point_of_no_return_a_cancel_is_refused() {
        let stage = Stage::new();
        stage.steered.progress.step(Step::Released, "");
        let late = stage.ask("POST", "/v1/cancel").unwrap_err().to_string();
        assert!(late.contains("point of no return") && late.contains("released"), "{late}");
        assert!(!stage.steered.cancel.is_set() && stage.audit().contains("too late"));
    }

    #[test]
    fn what_a_killed_manager_left_gives_way_and_another_managers_socket_stays() {
        let mut stage = Stage::new();
        let path = stage.path();
        // As if the first had been killed: its file is there, and the next one takes the name.
        let second = serve(&path, stage.steered.clone()).unwrap();
        stage.served = None;
        stage.ask("GET", "/v1/migration").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, SOCKET_MODE);
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn whoever_says_nothing_or_nonsense_is_cut_off_and_others_are_served() {
        let stage = Stage::new();
        let began = Instant::now();
        let mut silent: Vec<_> = (0..3 * MOST_CONNECTIONS)
            .map(|index| {
                let mut stream = UnixStream::connect(stage.path()).unwrap();
                let words: &[u8] = if index % 2 == 0 { b"" } else { b"GET /v1/migr" };
                stream.write_all(words).unwrap();
                stream
            })
            .collect();
        let mut garbage = UnixStream::connect(stage.path()).unwrap();
        let _cut_off = garbage.write_all(&vec![0xff; 100_000]);
        stage.ask("GET", "/v1/migration").unwrap();
        for stream in &mut silent {
            // The end of the stream, or words of it: in no case nothing.
            let mut answer = Vec::new();
            let _reset = stream.read_to_end(&mut answer);
        }
        assert!(began.elapsed() < Duration::from_secs(50), "{:?}", began.elapsed());
    }
}
