//! How the writers of hosted VMs are slowed: asked of their own processes, on a thread of its own, so that one that does not answer holds up no other figure.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::tracked::Key;
use crate::model::ThrottleView;
use crate::service::control::ask_throttles;

/// How long a process may take to answer.
const PATIENCE: Duration = Duration::from_millis(500);

/// What each VM answered; none: nothing.
type Answers = Vec<(Key, Option<ThrottleView>)>;

/// The thread.
pub(super) struct Throttles {
    questions: Option<Sender<Vec<(Key, PathBuf)>>>,
    answers: Receiver<Answers>,
    is_asking: bool,
    thread: Option<JoinHandle<()>>,
}

impl Throttles {
    /// Starts the thread.
    pub(super) fn start() -> std::io::Result<Self> {
        let (questions, todo) = channel::<Vec<(Key, PathBuf)>>();
        let (answer, answers) = channel();
        let thread = std::thread::Builder::new().name("throttles".into()).spawn(move || {
            for asked in todo {
                let (keys, sockets): (Vec<Key>, Vec<PathBuf>) = asked.into_iter().unzip();
                let views = ask_throttles(sockets, PATIENCE);
                if answer.send(keys.into_iter().zip(views).collect()).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self { questions: Some(questions), answers, is_asking: false, thread: Some(thread) })
    }

    /// Asks the VMs at these sockets, unless those that were asked before have not all answered yet.
    pub(super) fn ask(&mut self, vms: Vec<(Key, PathBuf)>) {
        if !self.is_asking && !vms.is_empty() {
            self.is_asking = self.questions.as_ref().is_some_and(|questions| questions.send(vms).is_ok());
        }
    }

    /// What was answered, once.
    pub(super) fn answered(&mut self) -> Option<Answers> {
        let answers = self.answers.try_recv().ok()?;
        self.is_asking = false;
        Some(answers)
    }
}

impl Drop for Throttles {
    fn drop(&mut self) {
        self.questions = None;
        if let Some(thread) = self.thread.take() {
            // It has already said why, if it panicked.
            let _ = thread.join();
        }
    }
}
