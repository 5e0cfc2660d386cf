//! What an agent serves: metrics over TCP, and the fleet's objects over a Unix socket. Control plane: tokio, on one thread; every answer comes
//! from a view that is there.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::{Path as At, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::serve::IncomingStream;
use axum::{Json, Router};
use prometheus_client::registry::Registry;
use tokio::net::UnixListener;
use tokio::sync::watch;

use super::metrics;
use crate::model::VmRef;
use crate::model::schema::Schema;
use crate::service::control::Outcome;
use crate::service::fleet::{FleetReader, FleetVm};

/// Owner and group may read and write, which is what connecting takes.
const SOCKET_MODE: u32 = 0o660;
/// How long a question that comes before the first look is held.
const FIRST_LOOK: Duration = Duration::from_secs(5);

/// Why nothing can be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address of the metrics.
    #[error("--listen {address}: {source}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The socket.
    #[error("{path}: {source}")]
    Socket {
        /// Which.
        path: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Somebody serves it already.
    #[error("{0} is served by another agent that runs; stop it, or choose another --run-dir")]
    Taken(String),
    /// The runtime.
    #[error("the agent's server could not be started")]
    Runtime(#[from] io::Error),
}

/// Everything that is served; ends when it is dropped, and the socket's file goes.
#[derive(Debug)]
pub(super) struct Served {
    /// Where metrics are, with the port that the kernel chose.
    pub(super) metrics: Option<SocketAddr>,
    /// The socket.
    pub(super) socket: PathBuf,
    ending: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.ending.send_replace(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Who asks.
#[derive(Clone, Debug)]
struct Caller(Option<(u32, u32)>);

impl Connected<IncomingStream<'_, UnixListener>> for Caller {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self(stream.io().peer_cred().ok().map(|credentials| (credentials.uid(), credentials.gid())))
    }
}

impl Caller {
    /// Root, the agent's own user, and its group.
    fn may_look(&self) -> bool {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        self.0.is_some_and(|(user, group)| user == 0 || user == uid || group == gid)
    }
}

/// Serves until what it returns is dropped.
///
/// # Errors
/// An address or a socket that cannot be had.
pub(super) fn serve(
    fleet: &FleetReader,
    listen: Option<SocketAddr>,
    socket: &Path,
    per_vcpu: bool,
) -> Result<Served, ServeError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let scrapes = match listen {
        None => None,
        Some(address) => {
            let failed = |source| ServeError::Listen { address, source };
            let listener = TcpListener::bind(address).map_err(failed)?;
            listener.set_nonblocking(true).map_err(failed)?;
            Some((listener.local_addr().map_err(failed)?, listener))
        }
    };
    let metrics = scrapes.as_ref().map(|(address, _)| *address);
    let observe = {
        let _context = runtime.enter();
        bind(socket)?
    };
    let registry = Arc::new(metrics::registry(fleet.clone(), per_vcpu));
    let questions = observing(fleet.clone());
    let (ending, at_end) = watch::channel(false);
    let end = |mut at_end: watch::Receiver<bool>| async move { drop(at_end.wait_for(|&end| end).await) };
    let (first, second) = (end(at_end.clone()), end(at_end.clone()));
    let last = end(at_end);
    let work = async move {
        let observe = axum::serve(observe, questions.into_make_service_with_connect_info::<Caller>());
        let observe = tokio::spawn(observe.with_graceful_shutdown(first).into_future());
        if let Some((_, listener)) = scrapes {
            match tokio::net::TcpListener::from_std(listener) {
                Ok(listener) => {
                    let scrapes = axum::serve(listener, scraping(registry)).with_graceful_shutdown(second);
                    drop(tokio::spawn(scrapes.into_future()));
                }
                Err(error) => tracing::error!("metrics: {error}"),
            }
        }
        // Connections that are kept open do not hold up the end: the runtime goes with this thread.
        last.await;
        drop(observe);
    };
    let thread = std::thread::Builder::new().name("agent-http".into()).spawn(move || runtime.block_on(work))?;
    Ok(Served { metrics, socket: socket.to_owned(), ending, thread: Some(thread) })
}

/// Binds the socket. A file that nobody serves any more gives way.
fn bind(path: &Path) -> Result<UnixListener, ServeError> {
    let failed = |source| ServeError::Socket { path: path.display().to_string(), source };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    match UnixStream::connect(path) {
        Ok(_) => return Err(ServeError::Taken(path.display().to_string())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)?;
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE)).map_err(failed)?;
    Ok(listener)
}

fn scraping(registry: Arc<Registry>) -> Router {
    let scrape = |State(registry): State<Arc<Registry>>| async move {
        ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics::text(&registry))
    };
    Router::new().route("/metrics", get(scrape)).with_state(registry)
}

fn observing(fleet: FleetReader) -> Router {
    Router::new()
        .route(
            "/v1/fleet",
            get(async |State(fleet): State<FleetReader>| {
                let view = first(fleet).await;
                Json(view.tagged()).into_response()
            }),
        )
        .route(
            "/v1/vms",
            get(async |State(fleet): State<FleetReader>| {
                let view = first(fleet).await;
                let vms: Vec<_> = view.vms.iter().map(|vm| vm.tagged()).collect();
                Json(vms).into_response()
            }),
        )
        .route(
            "/v1/addresses",
            get(async |State(fleet): State<FleetReader>| {
                let view = first(fleet).await;
                match &view.addresses {
                    Some(book) => Json(book.as_ref().clone().tagged()).into_response(),
                    None => {
                        let error = "nothing is known yet; ask again".to_owned();
                        (StatusCode::NOT_FOUND, Json(Outcome { error }.tagged())).into_response()
                    }
                }
            }),
        )
        .route(
            "/v1/vms/{id}",
            get(async |State(fleet): State<FleetReader>, At(id): At<String>| {
                let view = first(fleet).await;
                match find(&view.vms, &id) {
                    Ok(vm) => Json(vm.tagged()).into_response(),
                    Err(error) => (StatusCode::NOT_FOUND, Json(Outcome { error }.tagged())).into_response(),
                }
            }),
        )
        .layer(from_fn(known))
        .with_state(fleet)
}

/// A view; before the first look that is waited for.
async fn first(fleet: FleetReader) -> Arc<crate::service::fleet::FleetView> {
    let view = fleet.view();
    if view.sequence > 0 {
        return view;
    }
    let waiting = fleet.clone();
    tokio::task::spawn_blocking(move || waiting.next(0, FIRST_LOOK)).await.unwrap_or_else(|_| fleet.view())
}

/// Lets in whoever may look.
async fn known(ConnectInfo(caller): ConnectInfo<Caller>, request: Request, next: Next) -> Response {
    if caller.may_look() {
        return next.run(request).await;
    }
    let error = "only root, and the agent's own user and group, may look".to_owned();
    (StatusCode::FORBIDDEN, Json(Outcome { error }.tagged())).into_response()
}

/// The VM that `id` names: a UUID, a name, `uuid:U` or `pid:P`.
fn find<'a>(vms: &'a [FleetVm], id: &str) -> Result<&'a FleetVm, String> {
    let word = if id.parse::<uuid::Uuid>().is_ok() { format!("uuid:{id}") } else { id.to_owned() };
    let vm: VmRef = word.parse().map_err(|error| format!("`{id}`: {error}"))?;
    let fits = |found: &&FleetVm| match &vm {
        VmRef::Name(name) => found.name == name.as_str(),
        VmRef::Uuid(id) => found.vm_id == *id,
        VmRef::Pid(pid) => found.pid == *pid,
    };
    let mut fitting = vms.iter().filter(fits);
    match (fitting.next(), fitting.next()) {
        (Some(found), None) => Ok(found),
        (None, _) => Err(format!("no VM `{id}` runs on this host; GET /v1/vms lists those that do")),
        (Some(_), Some(_)) => Err(format!("several VMs are `{id}`; write pid:P")),
    }
}
