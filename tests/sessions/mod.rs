//! What clients see of a switch, a start, a failure.

mod proxy;
mod switch;
