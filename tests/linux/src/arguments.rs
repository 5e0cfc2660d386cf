//! The kernel's command line: the words that are ours.

/// Ours, read from `/proc/cmdline`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arguments(Vec<(String, String)>);

impl Arguments {
    /// The words `dunlin.NAME=VALUE` and `dunlin.NAME` of a command line.
    pub fn parse(line: &str) -> Self {
        let own = line.split_whitespace().filter_map(|word| word.strip_prefix("dunlin."));
        Self(own.map(|word| word.split_once('=').unwrap_or((word, ""))).map(|(n, v)| (n.into(), v.into())).collect())
    }

    /// The last value of `name`, as the kernel itself takes the last.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().rev().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }

    /// All values of `name`, in order.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(own, _)| own == name).map(|(_, value)| value.as_str())
    }
}

/// The value of `key` in `a:1,b:2`.
pub fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.split(',').find_map(|part| part.split_once(':').filter(|(own, _)| *own == key).map(|(_, value)| value))
}

/// A number of bytes with `K`, `M` or `G` behind it.
pub fn bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_shl(shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_words_are_found_among_the_kernels() {
        let arguments =
            Arguments::parse("console=ttyS0 dunlin.ip=10.0.0.2/24 quiet dunlin.wl=ws:4M dunlin.wl=ws:1M dunlin.x");
        assert_eq!(arguments.get("ip"), Some("10.0.0.2/24"));
        assert_eq!(arguments.all("wl").collect::<Vec<_>>(), ["ws:4M", "ws:1M"]);
        assert_eq!((arguments.get("x"), arguments.get("console")), (Some(""), None));
        assert_eq!((field("ws:4M,rate:7", "rate"), field("ws:4M", "rate")), (Some("7"), None));
        assert_eq!((bytes("4M"), bytes("12"), bytes("x"), bytes("")), (Some(4 << 20), Some(12), None, None));
    }
}
