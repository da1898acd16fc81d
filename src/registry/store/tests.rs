use super::*;

fn registry() -> (tempfile::TempDir, Registry) {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::open(&dir.path().join("registry.db")).unwrap();
    (dir, registry)
}

fn a_project(common_dir: &Path, proxy_port: u16) -> ProjectRecord {
    ProjectRecord {
        id: ProjectId::random(),
        name: "shop".into(),
        common_dir: common_dir.into(),
        config: "{}".into(),
        proxy_port,
        allowed_commands: None,
        created_at: time(1_700_000_000_123),
        deleted_at: None,
    }
}

fn a_branch(project: &ProjectRecord, name: &str) -> BranchRecord {
    BranchRecord {
        id: BranchId::random(),
        project: project.id.clone(),
        name: BranchName::new(name).unwrap(),
        parent: None,
        stage: Stage::Creating,
        volume: VolumeId::random(),
        driver: "copy".into(),
        pool: "/pool".into(),
        server: ServerRecord {
            runtime: "native".into(),
            programs: "/opt/pg/bin".into(),
            major: 15,
        },
        port: 0,
        started_once: false,
        created_at: time(1_700_000_000_456),
        trashed_at: None,
    }
}

#[test]
fn records_come_back_as_they_were_written() {
    let (dir, registry) = registry();
    let odd = {
        use std::os::unix::ffi::OsStrExt;
        Path::new(std::ffi::OsStr::from_bytes(b"/re\xffpo/\x01/.git")).to_owned()
    };
    let project = a_project(&odd, 15432);
    registry.put_project(&project).unwrap();
    let branch = registry
        .add_branch(&a_branch(&project, "feature/ü"), (15500, 15501), |_| true)
        .unwrap();
    assert_eq!(branch.port, 15500);
    let endpoint = EndpointRecord {
        project: project.id.clone(),
        git_dir: odd.clone(),
        branch: Some(branch.id.clone()),
        previous: None,
        head: Some("ref: x".into()),
        port: None,
    };
    registry.put_endpoint(&endpoint).unwrap();
    drop(registry);

    let registry = Registry::open(&dir.path().join("registry.db")).unwrap();
    assert_eq!(registry.project_at(&odd).unwrap(), Some(project.clone()));
    assert_eq!(
        registry.branches(&project.id).unwrap(),
        vec![branch.clone()]
    );
    assert_eq!(registry.endpoints(&project.id).unwrap(), vec![endpoint]);
    let mode = std::fs::metadata(dir.path().join("registry.db"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_live_name_is_taken_once_and_free_again_from_the_trash() {
    let (_dir, registry) = registry();
    let project = a_project(Path::new("/r/.git"), 15432);
    registry.put_project(&project).unwrap();
    let ports = (15500, 15509);
    let first = registry
        .add_branch(&a_branch(&project, "x"), ports, |_| true)
        .unwrap();
    let refused = registry.add_branch(&a_branch(&project, "x"), ports, |_| true);
    assert!(
        matches!(refused, Err(RegistryError::NameTaken(_))),
        "{refused:?}"
    );
    registry
        .add_branch(&a_branch(&project, "X"), ports, |_| true)
        .unwrap();
    registry
        .set_trashed(std::slice::from_ref(&first.id), SystemTime::now())
        .unwrap();
    registry
        .add_branch(&a_branch(&project, "x"), ports, |_| true)
        .unwrap();
    assert!(
        registry.untrash(&first.id, &first.name).is_err(),
        "the name is in use again"
    );
}

#[test]
fn ports_in_use_are_passed_over_until_none_is_left() {
    let (_dir, registry) = registry();
    let project = a_project(Path::new("/r/.git"), 15432);
    registry.put_project(&project).unwrap();
    let ports = (15500, 15502);
    let port = |name: &str| {
        registry
            .add_branch(&a_branch(&project, name), ports, |p| p != 15501)
            .map(|b| b.port)
    };
    assert_eq!(port("a").unwrap(), 15500);
    assert_eq!(port("b").unwrap(), 15502);
    assert!(matches!(port("c"), Err(RegistryError::NoPort { .. })));
}

#[test]
fn the_port_of_a_destroyed_branch_is_the_last_to_be_given_away_again() {
    let (_dir, registry) = registry();
    let project = a_project(Path::new("/r/.git"), 15432);
    registry.put_project(&project).unwrap();
    let add = |name: &str| {
        registry
            .add_branch(&a_branch(&project, name), (15500, 15502), |_| true)
            .unwrap()
    };
    let (first, second) = (add("a"), add("b"));
    registry.remove_branch(&first.id).unwrap();
    registry.remove_branch(&second.id).unwrap();
    assert_eq!([add("c").port, add("d").port], [15502, 15500]);
}

#[test]
fn destroying_a_parent_leaves_its_children() {
    let (_dir, registry) = registry();
    let project = a_project(Path::new("/r/.git"), 15432);
    registry.put_project(&project).unwrap();
    let parent = registry
        .add_branch(&a_branch(&project, "main"), (1, 9), |_| true)
        .unwrap();
    let mut child = a_branch(&project, "child");
    child.parent = Some(parent.id.clone());
    let child = registry.add_branch(&child, (1, 9), |_| true).unwrap();
    registry.remove_branch(&parent.id).unwrap();
    assert_eq!(registry.branch(&child.id).unwrap().unwrap().parent, None);
}

#[test]
fn changes_of_a_project_take_back_no_other() {
    let (_dir, registry) = registry();
    let project = a_project(Path::new("/r/.git"), 15432);
    registry.put_project(&project).unwrap();
    registry
        .change_project(&project.id, |p| p.allowed_commands = Some("digest".into()))
        .unwrap();
    // Whoever read the record before that changes something else.
    let changed = registry
        .change_project(&project.id, |p| p.config = "{ }".into())
        .unwrap()
        .unwrap();
    assert_eq!(changed.allowed_commands.as_deref(), Some("digest"));
    assert_eq!(registry.project(&project.id).unwrap(), Some(changed));
    assert_eq!(
        registry
            .change_project(&ProjectId::random(), |_| ())
            .unwrap(),
        None
    );
}

#[test]
fn a_deleted_project_gets_no_branch_and_goes_with_its_last_one() {
    let (_dir, registry) = registry();
    let project = a_project(Path::new("/r/.git"), 15432);
    registry.put_project(&project).unwrap();
    let branch = registry
        .add_branch(&a_branch(&project, "main"), (1, 9), |_| true)
        .unwrap();
    assert!(!registry.remove_project(&project.id).unwrap(), "it lives");
    registry
        .change_project(&project.id, |p| p.deleted_at = Some(time(1)))
        .unwrap();
    assert!(matches!(
        registry.add_branch(&a_branch(&project, "late"), (1, 9), |_| true),
        Err(RegistryError::ProjectGone)
    ));
    assert!(
        !registry.remove_project(&project.id).unwrap(),
        "main is left"
    );
    registry.remove_branch(&branch.id).unwrap();
    assert!(registry.remove_project(&project.id).unwrap());
    assert_eq!(registry.project(&project.id).unwrap(), None);
}

#[test]
fn a_parent_that_vanished_is_not_taken_for_a_taken_name() {
    let (_dir, registry) = registry();
    let project = a_project(Path::new("/r/.git"), 15432);
    registry.put_project(&project).unwrap();
    let mut orphan = a_branch(&project, "x");
    orphan.parent = Some(BranchId::random());
    let orphan = registry.add_branch(&orphan, (1, 9), |_| true).unwrap();
    assert_eq!(registry.branch(&orphan.id).unwrap().unwrap().parent, None);
}

#[test]
fn endpoints_never_lead_to_what_is_gone_or_in_the_trash() {
    let (_dir, registry) = registry();
    let project = a_project(Path::new("/r/.git"), 15432);
    registry.put_project(&project).unwrap();
    let trashed = registry
        .add_branch(&a_branch(&project, "x"), (1, 9), |_| true)
        .unwrap();
    registry
        .set_trashed(std::slice::from_ref(&trashed.id), time(1))
        .unwrap();
    registry
        .put_endpoint(&EndpointRecord {
            project: project.id.clone(),
            git_dir: "/r/.git".into(),
            branch: Some(trashed.id.clone()),
            previous: Some(BranchId::random()),
            head: None,
            port: None,
        })
        .unwrap();
    let found = registry.endpoints(&project.id).unwrap().remove(0);
    assert_eq!((found.branch, found.previous), (None, None));
}

#[test]
fn a_branch_comes_back_from_the_trash_under_a_free_name_only() {
    let (_dir, registry) = registry();
    let project = a_project(Path::new("/r/.git"), 15432);
    registry.put_project(&project).unwrap();
    let old = registry
        .add_branch(&a_branch(&project, "x"), (1, 9), |_| true)
        .unwrap();
    registry
        .set_trashed(std::slice::from_ref(&old.id), time(1))
        .unwrap();
    registry
        .add_branch(&a_branch(&project, "x"), (1, 9), |_| true)
        .unwrap();
    assert!(matches!(
        registry.untrash(&old.id, &old.name),
        Err(RegistryError::NameTaken(_))
    ));
    let other = BranchName::new("y").unwrap();
    registry.untrash(&old.id, &other).unwrap();
    let back = registry.branch(&old.id).unwrap().unwrap();
    assert_eq!((back.name, back.trashed_at), (other, None));
}

#[test]
fn a_newer_registry_is_left_alone() {
    let (dir, registry) = registry();
    registry
        .read(|c| Ok(c.pragma_update(None, "user_version", 99)?))
        .unwrap();
    drop(registry);
    let refused = Registry::open(&dir.path().join("registry.db"));
    assert!(matches!(
        refused,
        Err(RegistryError::Newer { found: 99, .. })
    ));
}

#[test]
fn a_registry_from_before_spare_volumes_goes_on() {
    let (dir, registry) = registry();
    let project = a_project(Path::new("/r/.git"), 15432);
    registry.put_project(&project).unwrap();
    let branch = registry
        .add_branch(&a_branch(&project, "x"), (1, 9), |_| true)
        .unwrap();
    registry
        .read(|c| {
            c.execute_batch("DROP TABLE spare_volumes; DROP TABLE moves")?;
            Ok(c.pragma_update(None, "user_version", 2)?)
        })
        .unwrap();
    drop(registry);
    let registry = Registry::open(&dir.path().join("registry.db")).unwrap();
    assert_eq!(registry.branch(&branch.id).unwrap(), Some(branch));
    assert_eq!(registry.spare_volumes().unwrap(), []);
}

#[test]
fn a_spare_volume_changes_places_with_the_branchs_own() {
    let (_dir, registry) = registry();
    let project = a_project(Path::new("/r/.git"), 15432);
    registry.put_project(&project).unwrap();
    let branch = registry
        .add_branch(&a_branch(&project, "x"), (1, 9), |_| true)
        .unwrap();
    let spare = VolumeId::random();
    registry.add_spare_volume(&spare, &branch.id).unwrap();
    registry.take_spare_volume(&spare, &branch.id).unwrap();
    let now = registry.branch(&branch.id).unwrap().unwrap();
    assert_eq!(now.volume, spare);
    assert_eq!(
        registry.spare_volumes().unwrap(),
        [(branch.volume.clone(), branch.id)]
    );
    registry.remove_spare_volume(&branch.volume).unwrap();
    assert_eq!(registry.spare_volumes().unwrap(), []);
}

fn a_place() -> Place {
    Place {
        volume: VolumeId::random(),
        driver: "btrfs".into(),
        pool: "/new".into(),
    }
}

#[test]
fn a_move_turns_the_branch_at_once_and_names_what_is_to_be_removed() {
    let (_dir, registry) = registry();
    let project = a_project(Path::new("/r/.git"), 15432);
    registry.put_project(&project).unwrap();
    let branch = registry
        .add_branch(&a_branch(&project, "main"), (1, 9), |_| true)
        .unwrap();
    registry.set_stage(&branch.id, Stage::Ready).unwrap();
    let (old, new) = (branch.place(), a_place());
    let begun = MoveRecord {
        branch: branch.id.clone(),
        remove: new.clone(),
    };
    registry.begin_move(&begun).unwrap();
    assert_eq!(registry.moves().unwrap(), [begun]);
    // One that could not be destroyed goes where the branch goes: among what is to be removed.
    let spare = VolumeId::random();
    registry.add_spare_volume(&spare, &branch.id).unwrap();
    assert!(!registry.holds_data(&new.volume).unwrap());

    registry.turn_move(&branch.id, &old, &new).unwrap();
    let turned = registry.branch(&branch.id).unwrap().unwrap();
    assert_eq!(turned.place(), new);
    assert!(turned.lies_in(Path::new("/new"), "btrfs"));
    assert!(registry.moves().unwrap().iter().any(|m| m.remove == old));
    assert!(registry.holds_data(&new.volume).unwrap());
    assert_eq!(registry.spare_volumes().unwrap(), []);
    let of_spare = Place {
        volume: spare.clone(),
        ..old.clone()
    };
    let moves = registry.moves().unwrap();
    assert!(moves.iter().any(|m| m.remove == of_spare));
    registry.end_move(&spare).unwrap();
    // The way back is the same.
    registry.turn_move(&branch.id, &new, &old).unwrap();
    assert_eq!(registry.branch(&branch.id).unwrap().unwrap().place(), old);
    registry.end_move(&new.volume).unwrap();
    assert_eq!(registry.moves().unwrap(), []);
}

#[test]
fn a_branch_that_is_gone_or_elsewhere_is_not_turned() {
    let (_dir, registry) = registry();
    let project = a_project(Path::new("/r/.git"), 15432);
    registry.put_project(&project).unwrap();
    let branch = registry
        .add_branch(&a_branch(&project, "main"), (1, 9), |_| true)
        .unwrap();
    registry.set_stage(&branch.id, Stage::Ready).unwrap();
    let (old, new) = (branch.place(), a_place());
    let refused = |from: &Place, to: &Place| {
        let turned = registry.turn_move(&branch.id, from, to);
        assert!(
            matches!(turned, Err(RegistryError::Elsewhere)),
            "{turned:?}"
        );
    };
    refused(&old, &new);
    registry
        .begin_move(&MoveRecord {
            branch: branch.id.clone(),
            remove: new.clone(),
        })
        .unwrap();
    refused(&a_place(), &new);
    registry.set_stage(&branch.id, Stage::Deleting).unwrap();
    refused(&old, &new);
    registry.remove_branch(&branch.id).unwrap();
    refused(&old, &new);
    // What was made stays to be removed.
    assert_eq!(registry.moves().unwrap().len(), 1);
}

#[test]
fn what_is_half_made_or_in_the_trash_is_not_counted() {
    let (_dir, registry) = registry();
    let project = a_project(Path::new("/repo"), 15432);
    registry.put_project(&project).unwrap();
    let add = |name: &str| {
        let new = a_branch(&project, name);
        registry
            .add_branch(&new, (15500, 15509), |_| true)
            .unwrap()
            .id
    };
    let [ready, half_made, trashed] = [add("a"), add("b"), add("c")];
    for id in [&ready, &trashed] {
        registry.set_stage(id, Stage::Ready).unwrap();
    }
    registry
        .set_trashed(std::slice::from_ref(&trashed), SystemTime::now())
        .unwrap();
    assert_eq!(registry.live_count(&project.id).unwrap(), 1);
    registry.set_stage(&half_made, Stage::Ready).unwrap();
    assert_eq!(registry.live_count(&project.id).unwrap(), 2);
    registry.set_stage(&ready, Stage::Deleting).unwrap();
    assert_eq!(registry.live_count(&project.id).unwrap(), 1);
}
