//! Words typed and words shown: input that is wrong, shapes that scripts rely on.

mod bad_input;
mod config;
mod help;
mod init;
mod json;
mod shell;
