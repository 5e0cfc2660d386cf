//! What an operator has written, and could not be read.

/// A machine option that could not be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{text}` {problem}")]
pub struct SpecError {
    text: String,
    problem: String,
}

impl SpecError {
    pub(super) fn new(text: &str, problem: impl Into<String>) -> Self {
        Self { text: text.to_owned(), problem: problem.into() }
    }
}
