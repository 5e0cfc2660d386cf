//! The control sockets of one VM: HTTP with JSON under `/v1`, on Unix sockets.
//!
//! Observing and acting are apart: `observe.sock` answers questions, `control.sock` takes orders as well and only from
//! root or the user that runs the machine. Control plane: tokio, on a thread of its own; the data plane never waits for
//! it. The client half is what `dunlin vm …` uses.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::IncomingStream;
use axum::{Json, Router};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

use super::balloon::BalloonReport;
use super::machine::{Host, VmInfo};
use crate::model::schema::Schema;
use crate::model::{Owner, PageSubset, ThrottleView, VcpuLimit, VmWrites};

/// Where all console output so far ends: what to ask from next.
const POSITION_HEADER: &str = "dunlin-position";
/// How long a question for new console output is held; shorter than what the end of a machine waits for last answers.
const CONSOLE_PATIENCE: Duration = Duration::from_secs(1);

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    uid: Option<u32>,
    pid: Option<i32>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Caller {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self::of(stream.io())
    }
}

impl Caller {
    /// Who is at the other end of `stream`, by the kernel's word.
    pub(super) fn of(stream: &UnixStream) -> Self {
        let credentials = stream.peer_cred().ok();
        Self { uid: credentials.as_ref().map(|c| c.uid()), pid: credentials.and_then(|c| c.pid()) }
    }

    /// Root, and the user that this process runs as.
    pub(super) fn may_act(&self) -> bool {
        let own = rustix::process::geteuid().as_raw();
        self.uid.is_some_and(|uid| uid == 0 || uid == own)
    }

    /// User and process, for the audit log.
    pub(super) fn name(&self) -> String {
        let show = |number: Option<i64>| number.map_or_else(|| "?".to_owned(), |number| number.to_string());
        format!("uid={} pid={}", show(self.uid.map(i64::from)), show(self.pid.map(i64::from)))
    }
}

/// What every order answers.
#[derive(Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Empty, or what went wrong and what to do.
    pub error: String,
}

impl Schema for Outcome {
    const SCHEMA: &'static str = "dunlin.outcome/v1";
}

/// The answer to an order.
pub(super) fn answer(result: Result<(), String>) -> Response {
    let (status, error) = match result {
        Ok(()) => (StatusCode::OK, String::new()),
        Err(error) => (StatusCode::CONFLICT, error),
    };
    (status, Json(Outcome { error }.tagged())).into_response()
}

#[derive(Deserialize)]
struct Resolution {
    owner: Owner,
}

/// What is to be write-protected, and when ([`Arm::arm_at`](crate::port::Arm::arm_at)); without a subset, every page at once.
#[derive(Deserialize)]
struct Switch {
    on: bool,
    #[serde(default)]
    subset: u64,
    #[serde(default)]
    at_ns: u64,
}

/// Switches the dirty log, and says what is protected then.
async fn dirty_log(
    ConnectInfo(caller): ConnectInfo<Caller>,
    State(host): State<Arc<Host>>,
    Query(switch): Query<Switch>,
) -> Response {
    if !caller.may_act() {
        return order(caller, |_| Ok(())).await;
    }
    let Switch { on, subset, at_ns } = switch;
    let subset = PageSubset::from_raw(subset);
    let work = move || if on { host.track(subset, at_ns) } else { host.end_tracking_now() };
    match tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string()) {
        Ok(Ok(protected)) => Json(protected.tagged()).into_response(),
        Ok(Err(error)) | Err(error) => answer(Err(error)),
    }
}

/// What vCPUs may write; none: all are let go, and nobody counts any more.
#[derive(Deserialize, Serialize)]
struct ThrottleOrder<'a> {
    limits: Option<Cow<'a, [Option<VcpuLimit>]>>,
}

/// What vCPUs have written.
#[derive(Deserialize, Serialize)]
struct Throttled {
    #[serde(flatten)]
    writes: VmWrites,
}

impl Schema for Throttled {
    const SCHEMA: &'static str = "dunlin.throttled/v1";
}

/// An answer with every member: for the test of the documentation.
#[cfg(test)]
pub(crate) fn throttled_sample() -> serde_json::Value {
    let writes = VmWrites { vcpus: vec![crate::model::VcpuWrites::default()], ..VmWrites::default() };
    serde_json::to_value(Throttled { writes }.tagged()).unwrap()
}

async fn throttled(
    ConnectInfo(caller): ConnectInfo<Caller>,
    State(host): State<Arc<Host>>,
    Json(wanted): Json<ThrottleOrder<'static>>,
) -> Response {
    if !caller.may_act() {
        return order(caller, |_| Ok(())).await;
    }
    let work = move || host.throttle(&caller.name(), wanted.limits.as_deref());
    match tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string()) {
        Ok(Ok(writes)) => Json(Throttled { writes }.tagged()).into_response(),
        Ok(Err(error)) | Err(error) => answer(Err(error)),
    }
}

/// The answer to one who may not act.
pub(super) fn forbidden(caller: &Caller) -> Response {
    let error = format!("{} may look but not act; use root or the machine's own user", caller.name());
    (StatusCode::FORBIDDEN, Json(Outcome { error }.tagged())).into_response()
}

/// Runs an order of `caller` on a thread that may block.
async fn order(caller: Caller, work: impl FnOnce(&str) -> Result<(), String> + Send + 'static) -> Response {
    if !caller.may_act() {
        return forbidden(&caller);
    }
    let done = tokio::task::spawn_blocking(move || work(&caller.name())).await;
    answer(done.unwrap_or_else(|error| Err(error.to_string())))
}

async fn info(State(host): State<Arc<Host>>) -> Response {
    Json(host.info().tagged()).into_response()
}

async fn throttle_view(State(host): State<Arc<Host>>) -> Response {
    Json(host.throttle_view().tagged()).into_response()
}

#[derive(Deserialize)]
struct Position {
    #[serde(default)]
    from: Option<u64>,
}

/// The output from a position on, waited for if there is none yet; without a position what is remembered.
async fn console(State(host): State<Arc<Host>>, Query(Position { from }): Query<Position>) -> Response {
    let read = move || {
        let patience = if from.is_some() { CONSOLE_PATIENCE } else { Duration::ZERO };
        host.machine().console().read_from(from.unwrap_or(0), patience)
    };
    match tokio::task::spawn_blocking(read).await {
        Ok((output, position)) => ([(POSITION_HEADER, position.to_string())], output).into_response(),
        Err(error) => answer(Err(error.to_string())),
    }
}

#[derive(Deserialize)]
struct BalloonQuestion {
    /// Wait for progress beyond this.
    #[serde(default)]
    seen: Option<u64>,
    /// Ask the guest how its memory is used.
    #[serde(default)]
    stats: bool,
}

#[derive(Deserialize)]
struct BalloonSize {
    size_bytes: u64,
}

async fn balloon(
    State(host): State<Arc<Host>>,
    Query(BalloonQuestion { seen, stats }): Query<BalloonQuestion>,
) -> Response {
    match tokio::task::spawn_blocking(move || super::balloon::report(host.machine(), seen, stats)).await {
        Ok(Ok(report)) => Json(report.tagged()).into_response(),
        Ok(Err(error)) => answer(Err(error)),
        Err(error) => answer(Err(error.to_string())),
    }
}

fn observing() -> Router<Arc<Host>> {
    Router::new()
        .route("/v1/machine", get(info))
        .route("/v1/throttle", get(throttle_view))
        .route("/v1/console", get(console))
        .route("/v1/balloon", get(balloon))
}

fn acting() -> Router<Arc<Host>> {
    type From = ConnectInfo<Caller>;
    type At = State<Arc<Host>>;
    observing()
        .route(
            "/v1/pause",
            post(|ConnectInfo(caller): From, State(host): At| order(caller, move |who| host.pause(who))),
        )
        .route(
            "/v1/resume",
            post(|ConnectInfo(caller): From, State(host): At| order(caller, move |who| host.resume(who))),
        )
        .route("/v1/stop", post(|ConnectInfo(caller): From, State(host): At| order(caller, move |who| host.stop(who))))
        .route(
            "/v1/resolve",
            post(|ConnectInfo(caller): From, State(host): At, Query(Resolution { owner }): Query<Resolution>| {
                order(caller, move |who| host.resolve(who, owner))
            }),
        )
        .route("/v1/dirty-log", post(dirty_log))
        .route("/v1/throttle", post(throttled))
        .route(
            "/v1/balloon",
            post(
                |ConnectInfo(caller): From, State(host): At, Query(BalloonSize { size_bytes }): Query<BalloonSize>| {
                    order(caller, move |who| host.set_balloon(who, size_bytes))
                },
            ),
        )
        .route(
            "/v1/balloon/ask-free",
            post(|ConnectInfo(caller): From, State(host): At| order(caller, move |_| host.ask_free())),
        )
        .route(
            "/v1/console",
            post(|ConnectInfo(caller): From, State(host): At, input: axum::body::Bytes| {
                order(caller, move |_| {
                    host.machine().console_input(&input);
                    Ok(())
                })
            }),
        )
}

/// How long an order that is being answered may hold the end of the process up.
const LAST_ANSWERS_LIMIT: Duration = Duration::from_secs(2);
/// How long a VM's process may take to say how it stands; one that is stopped would else hold up whoever asks.
const INFO_LIMIT: Duration = Duration::from_secs(5);

/// The sockets of a VM while they are served.
pub struct Served {
    ending: watch::Sender<bool>,
    ended: mpsc::Receiver<()>,
}

impl Served {
    /// Takes no more requests, and returns when those that are being answered have their answer, the order that ended
    /// the machine among them.
    pub fn finish(self) {
        self.ending.send_replace(true);
        if self.ended.recv_timeout(LAST_ANSWERS_LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
            tracing::warn!("a request is still unanswered after {LAST_ANSWERS_LIMIT:?}");
        }
    }
}

/// Serves both sockets of `host` until [`Served::finish`].
///
/// # Errors
/// Sockets that cannot be made.
pub fn serve(host: &Arc<Host>) -> io::Result<Served> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let (act, look) = {
        let _context = runtime.enter();
        (UnixListener::bind(host.socket("control"))?, UnixListener::bind(host.socket("observe"))?)
    };
    let (acting, observing) = (acting().with_state(Arc::clone(host)), observing().with_state(Arc::clone(host)));
    let (ending, mut at_end) = watch::channel(false);
    let (end, ended) = mpsc::channel();
    let mut at_end_too = at_end.clone();
    let work = async move {
        let acting = axum::serve(act, acting.into_make_service_with_connect_info::<Caller>())
            .with_graceful_shutdown(async move { drop(at_end.wait_for(|&end| end).await) });
        let observing = axum::serve(look, observing.into_make_service_with_connect_info::<Caller>())
            .with_graceful_shutdown(async move { drop(at_end_too.wait_for(|&end| end).await) });
        let (first, second) = tokio::join!(acting, observing);
        if let Err(error) = first.and(second) {
            tracing::error!("control sockets: {error}");
        }
    };
    std::thread::Builder::new().name("control".into()).spawn(move || {
        runtime.block_on(work);
        // Nobody may be waiting any more.
        let _ = end.send(());
    })?;
    Ok(Served { ending, ended })
}

/// A request to a VM's socket that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket or the HTTP exchange.
    #[error("{socket}: {problem}")]
    Exchange {
        /// Where.
        socket: String,
        /// What went wrong.
        problem: String,
    },
    /// The machine's answer.
    #[error("{0}")]
    Refused(String),
}

/// One request to the socket at `path`; the answer's head and body.
pub(super) async fn request(
    path: &Path,
    method: &str,
    target: &str,
    kind: &str,
    body: Vec<u8>,
) -> Result<(HeaderMap, Bytes), ControlError> {
    let failed = |problem: String| ControlError::Exchange { socket: path.display().to_string(), problem };
    let stream = UnixStream::connect(path).await.map_err(|error| failed(error.to_string()))?;
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(io).await.map_err(|error| failed(error.to_string()))?;
    tokio::spawn(connection);
    let request = hyper::Request::builder()
        .method(method)
        .uri(target)
        .header("host", "dunlin")
        .header("content-type", kind)
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| failed(error.to_string()))?;
    let response = sender.send_request(request).await.map_err(|error| failed(error.to_string()))?;
    let status = response.status();
    let headers = response.headers().clone();
    let body = response.into_body().collect().await.map_err(|error| failed(error.to_string()))?.to_bytes();
    if status.is_success() {
        return Ok((headers, body));
    }
    let outcome: Result<Outcome, _> = serde_json::from_slice(&body);
    Err(ControlError::Refused(outcome.map_or_else(|_| format!("status {status}"), |outcome| outcome.error)))
}

pub(super) fn blocking<T>(work: impl Future<Output = Result<T, ControlError>>) -> Result<T, ControlError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let failed = |error: io::Error| ControlError::Exchange { socket: "tokio".to_owned(), problem: error.to_string() };
    runtime.map_err(failed)?.block_on(work)
}

/// Gives an order: `POST target`.
///
/// # Errors
/// The machine's refusal, or a socket nobody serves.
pub fn give_order(socket: &Path, target: &str, body: &[u8]) -> Result<(), ControlError> {
    blocking(request(socket, "POST", target, "text/plain", body.to_vec())).map(drop)
}

/// As [`give_order`], but waits no longer than `limit`: the machine's process may be stopped. Returns the answer.
///
/// # Errors
/// As [`give_order`]; no answer in time, and then it is not known whether the order was carried out.
pub fn give_order_within(socket: &Path, target: &str, limit: Duration) -> Result<Vec<u8>, ControlError> {
    within(socket, limit, request(socket, "POST", target, "text/plain", Vec::new())).map(|(_, body)| body.to_vec())
}

pub(super) fn within<T>(
    socket: &Path,
    limit: Duration,
    exchange: impl Future<Output = Result<T, ControlError>>,
) -> Result<T, ControlError> {
    blocking(async {
        let late = || ControlError::Exchange {
            socket: socket.display().to_string(),
            problem: format!("no answer within {limit:?}: is the VM's process stopped?"),
        };
        tokio::time::timeout(limit, exchange).await.map_err(|_| late())?
    })
}

/// Limits what vCPUs may write, or lets all go (`None`); says what they have written.
///
/// # Errors
/// As [`give_order_within`]; a migration, or another who slows the VM, has it.
pub fn throttle(socket: &Path, limits: Option<&[Option<VcpuLimit>]>) -> Result<VmWrites, ControlError> {
    let failed = |error: serde_json::Error| ControlError::Exchange {
        socket: socket.display().to_string(),
        problem: error.to_string(),
    };
    let order = serde_json::to_vec(&ThrottleOrder { limits: limits.map(Cow::Borrowed) }).map_err(failed)?;
    let exchange = request(socket, "POST", "/v1/throttle", "application/json", order);
    let (_, body) = within(socket, LAST_ANSWERS_LIMIT, exchange)?;
    serde_json::from_slice::<Throttled>(&body).map(|throttled| throttled.writes).map_err(failed)
}

/// Asks several VMs at once how their writers are slowed; none of one that does not say within `limit`.
pub fn ask_throttles(sockets: Vec<PathBuf>, limit: Duration) -> Vec<Option<ThrottleView>> {
    let ask = |socket: PathBuf| async move {
        let asked = request(&socket, "GET", "/v1/throttle", "text/plain", Vec::new());
        let (_, body) = tokio::time::timeout(limit, asked).await.ok()?.ok()?;
        serde_json::from_slice(&body).ok()
    };
    let count = sockets.len();
    let all = async {
        let asked: Vec<_> = sockets.into_iter().map(|socket| tokio::spawn(ask(socket))).collect();
        let mut views = Vec::with_capacity(asked.len());
        for view in asked {
            views.push(view.await.ok().flatten());
        }
        Ok(views)
    };
    blocking(all).unwrap_or_else(|_| vec![None; count])
}

/// Asks for the VM's state.
///
/// # Errors
/// A socket nobody serves, no answer within five seconds, or one that is none.
pub fn ask_info(socket: &Path) -> Result<VmInfo, ControlError> {
    let (_, body) = within(socket, INFO_LIMIT, request(socket, "GET", "/v1/machine", "text/plain", Vec::new()))?;
    serde_json::from_slice(&body)
        .map_err(|error| ControlError::Exchange { socket: socket.display().to_string(), problem: error.to_string() })
}

/// Asks how the VM's balloon stands; with `seen`, when there is progress beyond it or a second is over; with `stats`, how
/// the guest uses its memory.
///
/// # Errors
/// A VM without a balloon, a socket nobody serves, or an answer that is none.
pub fn ask_balloon(socket: &Path, seen: Option<u64>, stats: bool) -> Result<BalloonReport, ControlError> {
    let seen = seen.map_or_else(String::new, |seen| format!("&seen={seen}"));
    let (_, body) =
        blocking(request(socket, "GET", &format!("/v1/balloon?stats={stats}{seen}"), "text/plain", Vec::new()))?;
    serde_json::from_slice(&body)
        .map_err(|error| ControlError::Exchange { socket: socket.display().to_string(), problem: error.to_string() })
}

/// Asks for the console's output from a position on, waiting a second at most for the first of it, or without one for what
/// is remembered. Returns it with the position behind it.
///
/// # Errors
/// A socket nobody serves, or an answer that is none.
pub fn ask_console(socket: &Path, from: Option<u64>) -> Result<(Vec<u8>, u64), ControlError> {
    let target = from.map_or_else(|| "/v1/console".to_owned(), |from| format!("/v1/console?from={from}"));
    let (headers, body) = blocking(request(socket, "GET", &target, "text/plain", Vec::new()))?;
    let position =
        headers.get(POSITION_HEADER).and_then(|value| value.to_str().ok()).and_then(|text| text.parse().ok());
    let lost = || ControlError::Exchange {
        socket: socket.display().to_string(),
        problem: format!("an answer without `{POSITION_HEADER}`: the machine's process is of another version"),
    };
    Ok((body.to_vec(), position.ok_or_else(lost)?))
}
