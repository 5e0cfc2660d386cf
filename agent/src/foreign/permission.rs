//! The operator's word that a foreign VM may be acted on.

/// Proof that an operator has allowed acting on one foreign VM, by configuration or by a flag. Made by the service that has looked;
/// whoever acts takes it, so that asking cannot be forgotten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permission {
    by: String,
}

impl Permission {
    /// The operator has allowed it; `by` says where (`--allow-arming`, a line of the configuration), for the audit.
    pub fn granted(by: impl Into<String>) -> Self {
        Self { by: by.into() }
    }

    /// Where it was given.
    pub fn by(&self) -> &str {
        &self.by
    }
}
