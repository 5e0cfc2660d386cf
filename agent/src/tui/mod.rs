//! Screens for terminals. A face: shows what [`crate::service`] has found, and knows nothing else.

pub mod top;
