# The part of nixpkgs' lib that the rendered modules use, written anew, and a module system without
# options: definitions merge, and two that contradict each other are an error.
let
  inherit (builtins)
    all
    any
    attrNames
    concatLists
    concatStringsSep
    filter
    foldl'
    head
    isAttrs
    isFunction
    isList
    length
    listToAttrs
    sort
    tail
    ;

  nameValuePair = name: value: { inherit name value; };
  mapAttrsToList = f: set: map (name: f name set.${name}) (attrNames set);
  mergeAttrsList = foldl' (found: set: found // set) { };

  mkOverride = priority: content: {
    _type = "override";
    inherit priority content;
  };
  mkOrder = order: content: {
    _type = "order";
    inherit order content;
  };

  # a definition with what mkForce, mkDefault, mkBefore and mkAfter said of it
  unwrap =
    found: value:
    if value._type or null == "override" then
      unwrap (found // { inherit (value) priority; }) value.content
    else if value._type or null == "order" then
      unwrap (found // { inherit (value) order; }) value.content
    else
      found // { inherit value; };
  isSet = value: isAttrs value && value.type or null != "derivation";

  merge =
    path: definitions:
    let
      all' = map (unwrap {
        priority = 100;
        order = 1000;
      }) definitions;
      strongest = foldl' (least: d: if d.priority < least then d.priority else least) 9999 all';
      kept = filter (d: d.priority == strongest) all';
      values = map (d: d.value) (sort (a: b: a.order < b.order) kept);
      keys = attrNames (mergeAttrsList values);
      toList = value: if isList value then value else [ value ];
    in
    if all isSet values then
      listToAttrs (
        map (
          key:
          nameValuePair key (
            merge (path ++ [ key ]) (map (v: v.${key}) (filter (v: v ? ${key}) values))
          )
        ) keys
      )
    else if any isList values then
      concatLists (map toList values)
    else if length values == 1 || all (v: v == head values) (tail values) then
      head values
    else
      throw "conflicting definitions of ${concatStringsSep "." path}";

  evaluate =
    { modules, specialArgs }:
    let
      load =
        module:
        let
          value = if isAttrs module || isFunction module then module else import module;
          called = if isFunction value then value (specialArgs // { inherit lib config; }) else value;
        in
        [ (removeAttrs called [ "imports" ]) ] ++ concatLists (map load (called.imports or [ ]));
      config = merge [ ] (concatLists (map load modules));
    in
    {
      inherit config;
    };

  lib = {
    inherit
      nameValuePair
      mapAttrsToList
      mkOverride
      mkOrder
      evaluate
      ;
    inherit (builtins) listToAttrs mapAttrs;
    mapAttrs' = f: set: listToAttrs (mapAttrsToList f set);
    concatMapAttrs = f: set: mergeAttrsList (mapAttrsToList f set);
    genAttrs = names: f: listToAttrs (map (name: nameValuePair name (f name)) names);
    getExe = package: "${package}/bin/${package.meta.mainProgram}";
    getLib = package: package.lib or package;
    makeBinPath = packages: concatStringsSep ":" (map (package: "${package}/bin") packages);
    mkForce = mkOverride 50;
    mkDefault = mkOverride 1000;
    mkBefore = mkOrder 500;
    mkAfter = mkOrder 1500;
  };
in
lib
