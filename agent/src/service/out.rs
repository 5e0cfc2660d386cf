//! What a command says. A reader that has gone away (`| head -n 1`) must not end a command that has more to do than talk, so
//! words that nobody takes are dropped; `println!` and `eprintln!` would panic.

use std::fmt::Arguments;
use std::io::Write;

/// Prints a line on standard output.
macro_rules! say {
    ($($words:tt)*) => {
        $crate::service::out::line(format_args!($($words)*))
    };
}
pub(crate) use say;

/// Prints a line on standard error.
macro_rules! complain {
    ($($words:tt)*) => {
        $crate::service::out::error_line(format_args!($($words)*))
    };
}
pub(crate) use complain;

/// Prints a line on standard output.
pub(crate) fn line(words: Arguments<'_>) {
    let _reader_is_gone = writeln!(std::io::stdout(), "{words}");
}

/// Prints a line on standard error.
pub(crate) fn error_line(words: Arguments<'_>) {
    let _reader_is_gone = writeln!(std::io::stderr(), "{words}");
}

/// Prints bytes that end their own lines on standard output; whether somebody took them.
pub(crate) fn bytes(bytes: &[u8]) -> bool {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).is_ok()
}
