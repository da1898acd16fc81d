//! The api on a loopback port.

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::support::{LIMIT, TestEnv, edit_config, wait_until};

#[test]
fn the_api_port_answers_to_the_token_only_and_closes_with_its_key() {
    let env = TestEnv::bare();
    // No branch will need the last port of the block.
    let port = env.ports.last();
    env.write_config(&env.repo(), "shop", env.ports.first);
    edit_config(&env.repo(), |c| {
        c["api_port"] = port.into();
        c["port_max"] = (port - 1).into();
    });
    let _ = env.dbranch(&["init", "--yes"]).ok();
    wait_until(LIMIT, "the api listens", || ask(port, None).is_some());
    assert!(ask(port, None).is_some_and(|answer| answer.starts_with("HTTP/1.1 401")));
    let file = env.path("home/state/secrets/api.token");
    let token = std::fs::read_to_string(file).expect("the token lies beside the passwords");
    let answer = ask(port, Some(token.trim())).expect("it listens");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("\"name\":\"shop\""), "{answer}");

    edit_config(&env.repo(), |c| c["api_port"] = serde_json::Value::Null);
    let _ = env.dbranch(&["init", "--yes"]).ok();
    wait_until(LIMIT, "nobody listens", || ask(port, None).is_none());
}

/// What the api answers to a request for the projects; none where nobody listens.
fn ask(port: u16, token: Option<&str>) -> Option<String> {
    let mut connection = TcpStream::connect(("127.0.0.1", port)).ok()?;
    let authorization =
        token.map_or_else(String::new, |t| format!("Authorization: Bearer {t}\r\n"));
    let request = format!(
        "POST /v1/projects HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{authorization}Connection: close\r\nContent-Length: 0\r\n\r\n"
    );
    connection.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).ok()?;
    Some(answer)
}
