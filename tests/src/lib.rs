//! Support for the integration suites.
