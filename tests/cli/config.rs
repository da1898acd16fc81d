//! `.dbranch.config.json`: every wrong one is refused by key, line and what is allowed.

use std::fs;

use crate::support::{TestEnv, edit_config};

/// Asserts that a config is refused as configuration, in words that name the file and all of `words`.
#[track_caller]
fn refused(config: &str, words: &[&str]) {
    let env = TestEnv::bare();
    let file = env.repo().join(".dbranch.config.json");
    fs::write(&file, config).expect("ours");
    let words: Vec<&str> = words
        .iter()
        .copied()
        .chain([".dbranch.config.json"])
        .collect();
    for args in [&["init", "--yes"][..], &["status"]] {
        let _ = env.dbranch(args).fails(2, &words);
    }
    assert_eq!(
        fs::read_to_string(&file).expect("there"),
        config,
        "left as it was"
    );
}

#[test]
fn an_unknown_key_is_refused_with_the_nearest_known_one() {
    refused(
        "{\n  \"name\": \"shop\",\n  \"proxyport\": 5433\n}\n",
        &["proxyport", "proxy_port", "3"],
    );
}

#[test]
fn an_unknown_key_inside_a_section_is_refused() {
    refused(
        "{\"name\": \"shop\", \"postgres\": {\"versoin\": 15}}",
        &["versoin", "version"],
    );
}

#[test]
fn half_a_file_is_refused_with_its_line() {
    refused("{\n  \"name\": \"shop\",\n", &["line"]);
}

#[test]
fn an_empty_file_is_refused() {
    refused("", &["empty"]);
}

#[test]
fn a_value_of_the_wrong_kind_is_refused() {
    refused(
        "{\"name\": \"shop\", \"proxy_port\": \"5433\"}",
        &["proxy_port"],
    );
    refused(
        "{\"name\": \"shop\", \"proxy_port\": 70000}",
        &["proxy_port"],
    );
    refused(
        "{\"name\": \"shop\", \"postgres\": {\"version\": 12}}",
        &["version", "13"],
    );
}

#[test]
fn a_port_range_upside_down_is_refused() {
    refused(
        "{\"name\": \"shop\", \"port_min\": 7000, \"port_max\": 6000}",
        &["port_min", "port_max"],
    );
}

#[test]
fn a_setting_that_dbranch_manages_is_refused() {
    let config =
        "{\"name\": \"shop\", \"postgres\": {\"settings\": {\"listen_addresses\": \"*\"}}}";
    refused(config, &["listen_addresses"]);
}

#[test]
fn a_file_that_is_no_text_is_refused() {
    let env = TestEnv::bare();
    fs::write(env.repo().join(".dbranch.config.json"), [0xff, 0xfe, 0]).expect("ours");
    let _ = env.dbranch(&["status"]).fails(2, &[".dbranch.config.json"]);
}

#[test]
fn a_folder_in_the_files_place_is_refused() {
    let env = TestEnv::bare();
    fs::create_dir(env.repo().join(".dbranch.config.json")).expect("ours");
    let out = env.dbranch(&["status"]);
    let code = out.code.unwrap_or_default();
    assert!(matches!(code, 1 | 2), "{out}");
    let _ = out.fails(code, &[".dbranch.config.json"]);
}

#[test]
fn the_example_is_accepted_as_it_is() {
    let env = TestEnv::bare();
    let example = include_str!("../../.dbranch.config.example.json");
    fs::write(env.repo().join(".dbranch.config.json"), example).expect("ours");
    // Its ports may be taken on this machine: ours are not.
    edit_config(&env.repo(), |c| {
        c["proxy_port"] = env.ports.first.into();
        if c.get("api_port").is_some() {
            c["api_port"] = (env.ports.first + 1).into();
        }
        c["port_min"] = (env.ports.first + 4).into();
        c["port_max"] = env.ports.last().into();
    });
    let _ = env.dbranch(&["init", "--yes"]).ok();
}

#[test]
fn settings_reach_the_server_and_branches_of_it() {
    let Some(env) = TestEnv::quick() else { return };
    env.write_config(&env.repo(), "shop", env.ports.first);
    edit_config(&env.repo(), |c| {
        c["postgres"]["user"] = "ada".into();
        c["postgres"]["database"] = "ledger".into();
        c["postgres"]["settings"]["work_mem"] = "7MB".into();
        c["postgres"]["settings"]["search_path"] = "\"it's\", public".into();
    });
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let _ = env.dbranch(&["init-postgres"]).ok();
    let _ = env.dbranch(&["create", "b"]).ok();
    for branch in ["main", "b"] {
        assert_eq!(env.sql_on(branch, "show work_mem"), "7MB");
        assert_eq!(env.sql_on(branch, "show search_path"), "\"it's\", public");
        assert_eq!(
            env.sql_on(branch, "select current_user, current_database()"),
            "ada|ledger"
        );
    }
}

#[test]
fn commands_of_a_config_run_only_once_they_are_allowed() {
    let Some(env) = TestEnv::ready() else { return };
    let mark = env.path("elsewhere/mark");
    let _ = env.git(&["checkout", "-q", "-b", "before"]).ok();
    edit_config(&env.repo(), |c| {
        c["commands"]["after_create"] =
            serde_json::json!([format!("echo ran >> {}", mark.display())]);
    });
    let _ = env.git(&["checkout", "-q", "-b", "unasked"]).ok();
    assert!(!mark.exists(), "nobody has allowed it");
    let _ = env.dbranch(&["allow", "--yes"]).ok();
    let _ = env.git(&["checkout", "-q", "-b", "asked"]).ok();
    crate::support::wait_until(crate::support::LIMIT, "the command has run", || {
        mark.exists()
    });
    // What was allowed is that very content.
    edit_config(&env.repo(), |c| {
        c["commands"]["after_create"] = serde_json::json!([format!("rm {}", mark.display())]);
    });
    let _ = env.git(&["checkout", "-q", "-b", "changed"]).ok();
    assert!(mark.exists());
}
