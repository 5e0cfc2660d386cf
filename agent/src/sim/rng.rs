//! The simulation's randomness: the words' own generator, by the name that the simulation calls it.

pub(super) use crate::model::random::{Random as Rng, mix};
