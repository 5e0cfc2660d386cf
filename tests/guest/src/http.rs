//! Owns the understanding of a request line: which page is asked for, and the settings in its query.

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// `/`
    Index,
    /// `/counters`
    Counters,
    /// `/set?...` with its query
    Set(&'a str),
    /// `/verify`
    Verify,
    /// `/reset-gap`
    ResetGap,
    /// `/poison?...` with its query: breaks a page on purpose
    Poison(&'a str),
    /// `/poweroff`
    PowerOff,
    /// `/reset`
    Reset,
    /// Any other path
    Unknown,
    /// Not a GET request
    Malformed,
}

/// Parses what a client sent; `None` while the head of the request is not complete.
pub fn parse(input: &[u8]) -> Option<Request<'_>> {
    let complete = input.windows(4).any(|end| end == b"\r\n\r\n") || input.windows(2).any(|end| end == b"\n\n");
    if !complete {
        return None;
    }
    let line = input.split(|byte| *byte == b'\r' || *byte == b'\n').next()?;
    Some(core::str::from_utf8(line).ok().and_then(request).unwrap_or(Request::Malformed))
}

fn request(line: &str) -> Option<Request<'_>> {
    let target = line.strip_prefix("GET ")?.split(' ').next()?;
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    Some(match path {
        "/" => Request::Index,
        "/counters" => Request::Counters,
        "/set" => Request::Set(query),
        "/verify" => Request::Verify,
        "/reset-gap" => Request::ResetGap,
        "/poison" => Request::Poison(query),
        "/poweroff" => Request::PowerOff,
        "/reset" => Request::Reset,
        _ => Request::Unknown,
    })
}

/// The `name=value` pairs of a query.
pub fn pairs(query: &str) -> impl Iterator<Item = (&str, &str)> {
    query.split('&').filter(|pair| !pair.is_empty()).map(|pair| pair.split_once('=').unwrap_or((pair, "")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_told_apart() {
        let parse_line = |line: &str| match parse(format!("{line}\r\nHost: x\r\n\r\n").as_bytes()) {
            Some(Request::Set(query)) => format!("set {query}"),
            other => format!("{other:?}"),
        };
        assert_eq!(parse_line("GET / HTTP/1.1"), "Some(Index)");
        assert_eq!(parse_line("GET /counters HTTP/1.0"), "Some(Counters)");
        assert_eq!(parse_line("GET /set?cpu=0&rate=5 HTTP/1.1"), "set cpu=0&rate=5");
        assert_eq!(parse_line("GET /nothing HTTP/1.1"), "Some(Unknown)");
        assert_eq!(parse_line("POST / HTTP/1.1"), "Some(Malformed)");
        assert_eq!(parse(b"GET / HTTP/1.1\r\nHost:"), None);
        assert_eq!(parse(b"\xff\xff\n\n"), Some(Request::Malformed));
        assert_eq!(parse(b"GET /verify\n\n"), Some(Request::Verify));
    }

    #[test]
    fn queries_split_into_pairs() {
        let all: Vec<_> = pairs("cpu=1&rate=max&&spin").collect();
        assert_eq!(all, [("cpu", "1"), ("rate", "max"), ("spin", "")]);
    }
}
