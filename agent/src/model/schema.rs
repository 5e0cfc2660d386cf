//! The schema tag that every JSON object carries: `"schema": "dunlin.KIND/v1"`.

use serde::Serialize;

/// An object with its schema tag in front, as it is printed or sent to a client.
#[derive(Clone, Debug, Serialize)]
pub struct Tagged<T> {
    schema: &'static str,
    #[serde(flatten)]
    body: T,
}

/// What has a schema name.
pub trait Schema: Serialize {
    /// The name and version, `dunlin.KIND/v1`. Fields are only ever added under the same version.
    const SCHEMA: &'static str;

    /// The object with its tag.
    fn tagged(&self) -> Tagged<&Self> {
        Tagged { schema: Self::SCHEMA, body: self }
    }
}
