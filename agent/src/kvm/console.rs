//! Where the guest's serial console goes: standard streams, a file, or a socket; and a memory of its last 64 KiB.
//!
//! Owns the sinks and the threads that read input. Must not know the serial port's registers. A sink that is gone
//! never stops the guest, nor does a socket's client that does not read: it loses output.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::model::SerialSpec;

/// How much output is remembered.
pub const HISTORY_BYTES: usize = 64 << 10;

/// The console could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("serial console {place}: {action} failed")]
pub struct ConsoleError {
    place: String,
    action: &'static str,
    #[source]
    source: io::Error,
}

/// Takes what a person types to the guest.
pub(crate) trait Input: Send + Sync {
    /// Queues bytes; those that do not fit are dropped.
    fn input(&self, bytes: &[u8]);
}

#[derive(Debug)]
enum Sink {
    None,
    Stdout,
    File(File),
    /// The one client, if there is one.
    Socket(Option<UnixStream>),
}

/// Where input comes from.
enum Source {
    Stdin(File),
    Socket(UnixListener),
}

#[derive(Debug)]
struct Output {
    sink: Sink,
    history: VecDeque<u8>,
    /// Bytes ever written.
    written: u64,
}

/// The console's outside.
#[derive(Debug)]
pub struct Console {
    output: Mutex<Output>,
    grown: Condvar,
    /// Ends the input thread.
    quit: Arc<EventFd>,
    reader: Mutex<Option<JoinHandle<()>>>,
    socket: Option<PathBuf>,
}

impl Console {
    /// Opens the console. A file is appended to; a socket is listened on, in place of a stale one.
    pub fn open(spec: &SerialSpec) -> Result<Arc<Self>, ConsoleError> {
        let sink = match spec {
            SerialSpec::None => Sink::None,
            SerialSpec::Stdio => Sink::Stdout,
            SerialSpec::File(path) => {
                Sink::File(File::options().append(true).create(true).open(path).map_err(failed(path, "open"))?)
            }
            SerialSpec::Socket(_) => Sink::Socket(None),
        };
        let socket = match spec {
            SerialSpec::Socket(path) => Some(path.clone()),
            _ => None,
        };
        let quit = EventFd::new(EFD_NONBLOCK).map_err(failed(Path::new("-"), "eventfd"))?;
        Ok(Arc::new(Self {
            output: Mutex::new(Output { sink, history: VecDeque::new(), written: 0 }),
            grown: Condvar::new(),
            quit: Arc::new(quit),
            reader: Mutex::new(None),
            socket,
        }))
    }

    /// Starts to bring input from standard input or the socket to `input`.
    pub(crate) fn connect(self: &Arc<Self>, input: &Arc<impl Input + 'static>) -> Result<(), ConsoleError> {
        let stdio = matches!(self.lock().sink, Sink::Stdout);
        // A descriptor of our own: the standard library's reader would keep bytes that poll cannot see.
        let stdin = || rustix::io::fcntl_dupfd_cloexec(io::stdin(), 0).map_err(io::Error::from);
        let source = match &self.socket {
            Some(path) => Source::Socket(listen(path)?),
            None if stdio => Source::Stdin(stdin().map_err(failed(Path::new("-"), "standard input"))?.into()),
            None => return Ok(()),
        };
        let (quit, console) = (self.quit.clone(), Arc::downgrade(self));
        // Weak, since the input's end holds the console.
        let input: Weak<dyn Input> = Arc::downgrade(&(input.clone() as Arc<dyn Input>));
        let thread = std::thread::Builder::new()
            .name("console".into())
            .spawn(move || match source {
                Source::Socket(listener) => serve_socket(&listener, &console, &quit, &input),
                Source::Stdin(stdin) => {
                    forward(&stdin, &mut |buffer| (&stdin).read(buffer), &quit, &input);
                }
            })
            .map_err(failed(Path::new("-"), "thread"))?;
        *self.reader.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes output of the guest.
    fn write(&self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let mut output = self.lock();
        // What a sink cannot take is lost for it; the history has it.
        let lost = match &mut output.sink {
            Sink::None => false,
            Sink::Stdout => io::stdout().lock().write_all(bytes).and_then(|()| io::stdout().flush()).is_err(),
            Sink::File(file) => file.write_all(bytes).is_err(),
            Sink::Socket(client) => client.as_mut().is_some_and(|client| gone(client.write_all(bytes))),
        };
        if lost && let Sink::Socket(client) = &mut output.sink {
            *client = None;
        }
        let keep = &bytes[bytes.len().saturating_sub(HISTORY_BYTES)..];
        let overflow = (output.history.len() + keep.len()).saturating_sub(HISTORY_BYTES);
        output.history.drain(..overflow);
        output.history.extend(keep);
        output.written += bytes.len() as u64;
        drop(output);
        self.grown.notify_all();
    }

    /// The output from byte `position` of all output on, or from the oldest that is remembered, and the position behind it.
    /// Waits up to `timeout` while there is none.
    pub fn read_from(&self, position: u64, timeout: Duration) -> (Vec<u8>, u64) {
        let output = self.lock();
        let (output, _) = self
            .grown
            .wait_timeout_while(output, timeout, |output| output.written <= position)
            .unwrap_or_else(PoisonError::into_inner);
        let oldest = output.written - output.history.len() as u64;
        let skip = position.clamp(oldest, output.written) - oldest;
        (output.history.iter().skip(skip as usize).copied().collect(), output.written)
    }

    /// The output that is remembered.
    pub fn history(&self) -> Vec<u8> {
        self.lock().history.iter().copied().collect()
    }
}

impl super::serial::Output for Console {
    fn output(&self, bytes: &[u8]) {
        self.write(bytes);
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = self.quit.write(1);
        if let Some(reader) = self.reader.lock().unwrap_or_else(PoisonError::into_inner).take()
            // The reader itself may hold the last reference for a moment.
            && reader.thread().id() != std::thread::current().id()
        {
            let _ = reader.join();
        }
        if let Some(path) = &self.socket {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn failed(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> ConsoleError {
    let place = path.display().to_string();
    move |source| ConsoleError { place, action, source }
}

/// Whether a client is gone, as opposed to slow.
fn gone(result: io::Result<()>) -> bool {
    result.is_err_and(|e| e.kind() != io::ErrorKind::WouldBlock)
}

/// Listens at `path`, taking the place of a socket that nobody listens on any more.
fn listen(path: &Path) -> Result<UnixListener, ConsoleError> {
    let stale = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
        && UnixStream::connect(path).is_err();
    if stale {
        let _ = std::fs::remove_file(path);
    }
    let listener = UnixListener::bind(path).map_err(failed(path, "listen"))?;
    listener.set_nonblocking(true).map_err(failed(path, "listen"))?;
    Ok(listener)
}

/// Waits until `fd` can be read. False: quit.
fn readable(fd: &impl AsFd, quit: &EventFd) -> bool {
    // SAFETY: the event's descriptor stays open as long as `quit` is borrowed.
    let quit = unsafe { BorrowedFd::borrow_raw(quit.as_raw_fd()) };
    loop {
        let mut fds = [PollFd::new(fd, PollFlags::IN), PollFd::new(&quit, PollFlags::IN)];
        match poll(&mut fds, None::<&Timespec>) {
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
            Ok(_) if !fds[1].revents().is_empty() => return false,
            Ok(_) if !fds[0].revents().is_empty() => return true,
            Ok(_) => {}
        }
    }
}

/// Brings input to the guest until its source ends. False: quit.
fn forward(
    source: &impl AsFd,
    read: &mut dyn FnMut(&mut [u8]) -> io::Result<usize>,
    quit: &EventFd,
    input: &Weak<dyn Input>,
) -> bool {
    let mut buffer = [0; 1024];
    while readable(source, quit) {
        match read(&mut buffer) {
            Ok(0) => return true,
            Ok(count) => match input.upgrade() {
                Some(input) => input.input(&buffer[..count]),
                None => return false,
            },
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => return true,
        }
    }
    false
}

/// Serves one client after the other.
fn serve_socket(listener: &UnixListener, console: &Weak<Console>, quit: &EventFd, input: &Weak<dyn Input>) {
    while readable(listener, quit) {
        let Ok((client, _)) = listener.accept() else { continue };
        let Ok(copy) = client.set_nonblocking(true).and_then(|()| client.try_clone()) else { continue };
        match console.upgrade() {
            Some(console) => console.lock().sink = Sink::Socket(Some(copy)),
            None => return,
        }
        let go_on = forward(&client, &mut |buffer| (&client).read(buffer), quit, input);
        if let Some(console) = console.upgrade() {
            console.lock().sink = Sink::Socket(None);
        }
        if !go_on {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Typed(Mutex<Vec<u8>>, Condvar);

    impl Input for Typed {
        fn input(&self, bytes: &[u8]) {
            self.0.lock().unwrap().extend_from_slice(bytes);
            self.1.notify_all();
        }
    }

    #[test]
    fn only_the_last_output_is_remembered() {
        let console = Console::open(&SerialSpec::None).unwrap();
        for chunk in 0..200u8 {
            console.write(&[chunk; 1000]);
        }
        assert_eq!(console.history().len(), HISTORY_BYTES);
        assert_eq!(console.read_from(0, Duration::ZERO), (console.history(), 200_000));
        assert_eq!(console.read_from(199_990, Duration::ZERO).0, [199; 10]);
        assert_eq!(console.read_from(1 << 40, Duration::ZERO), (Vec::new(), 200_000));
    }

    #[test]
    fn a_file_is_appended_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        std::fs::write(&path, "before ").unwrap();
        Console::open(&SerialSpec::File(path.clone())).unwrap().write(b"after");
        assert_eq!(std::fs::read(path).unwrap(), b"before after");
    }

    #[test]
    fn a_socket_serves_one_client_after_the_other_and_goes_with_the_console() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        // A socket that nobody listens on any more is replaced.
        drop(UnixListener::bind(&path).unwrap());
        let console = Console::open(&SerialSpec::Socket(path.clone())).unwrap();
        let typed = Arc::new(Typed::default());
        console.connect(&typed).unwrap();
        for name in [b"one", b"two"] {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(name).unwrap();
            let got = typed.0.lock().unwrap();
            drop(typed.1.wait_while(got, |got| !got.ends_with(name)).unwrap());
            console.write(b"out");
            let mut out = [0; 3];
            client.read_exact(&mut out).unwrap();
            assert_eq!(&out, b"out");
        }
        drop(console);
        assert!(!path.exists());
    }
}
