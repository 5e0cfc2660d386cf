//! Golden text of the metrics.
