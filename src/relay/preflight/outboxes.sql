-- The publication and the trees of tables that look like outboxes: see outboxes.rs, which fills what is in braces.
WITH RECURSIVE pub AS MATERIALIZED (
  SELECT oid, pubname, pubinsert, pubupdate, puballtables, {via_root} AS viaroot FROM pg_catalog.pg_publication WHERE pubname = {name}
), published AS MATERIALIZED (
  SELECT g.relid, {attrs} AS attrs, {quals} AS qual FROM pub, LATERAL pg_catalog.pg_get_publication_tables(pub.pubname::text) g
), columns AS MATERIALIZED (
  SELECT attrelid, count(*) FILTER (WHERE attname = ANY ({needed})) = {count} AS needed,
    count(*) FILTER (WHERE attname = ANY ({meant})) > 0 AS meant
  FROM pg_catalog.pg_attribute WHERE attname = ANY ({needed} || {meant}) AND attnum > 0 AND NOT attisdropped GROUP BY attrelid
), seed AS (
  SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN columns a ON a.attrelid = c.oid
  WHERE c.relpersistence <> 't' AND c.oid >= 16384
    AND (c.relkind IN ('r', 'p', 'f') AND ({alike} OR c.oid = ANY (ARRAY[{oids}]::oid[]))
      OR c.relkind IN ('r', 'p', 'f', 'v', 'm') AND ({named}))
), up(oid) AS (
  SELECT oid FROM seed UNION SELECT i.inhparent FROM up JOIN pg_catalog.pg_class c ON c.oid = up.oid AND c.relispartition
    JOIN pg_catalog.pg_inherits i ON i.inhrelid = up.oid
), above(oid, ancestor) AS (
  SELECT up.oid, i.inhparent FROM up JOIN pg_catalog.pg_inherits i ON i.inhrelid = up.oid
  UNION SELECT above.oid, i.inhparent FROM above JOIN pg_catalog.pg_inherits i ON i.inhrelid = above.ancestor
), member AS MATERIALIZED (
  SELECT r.prrelid, r.xmin AS xid FROM pub JOIN pg_catalog.pg_publication_rel r ON r.prpubid = pub.oid AND {included}
), tree(root, oid, via, member, automatic) AS (
  SELECT c.oid, c.oid, p.relid, m.prrelid IS NOT NULL OR auto.auto, auto.auto OR m.xid::text = c.xmin::text
  FROM up JOIN pg_catalog.pg_class c ON c.oid = up.oid LEFT JOIN published p ON p.relid = c.oid
    LEFT JOIN member m ON m.prrelid = c.oid LEFT JOIN pub ON true,
    LATERAL (SELECT COALESCE(puballtables AND NOT {excepted} OR {by_schema}, false) AS auto) auto
  WHERE NOT EXISTS (SELECT FROM above JOIN up it ON it.oid = above.ancestor WHERE above.oid = c.oid)
  UNION
  SELECT t.root, c.oid, CASE WHEN c.relispartition THEN COALESCE(t.via, p.relid) ELSE p.relid END,
    c.relispartition AND t.member OR m.prrelid IS NOT NULL OR auto.auto,
    c.relispartition AND t.automatic OR auto.auto OR m.xid::text = c.xmin::text
  FROM tree t JOIN pg_catalog.pg_inherits i ON i.inhparent = t.oid JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid
    LEFT JOIN published p ON p.relid = c.oid LEFT JOIN member m ON m.prrelid = c.oid LEFT JOIN pub ON true,
    LATERAL (SELECT COALESCE(puballtables AND NOT {excepted} OR {by_schema}, false) AS auto) auto
)
SELECT 'publication', pg_catalog.json_build_object('oid', oid::bigint, 'inserts', pubinsert, 'updates', pubupdate, 'all_tables', puballtables,
  'via_root', viaroot, 'except', {except}, 'named', ARRAY(SELECT pg_catalog.json_build_array(c.oid::bigint,
    pg_catalog.format('%I.%I', n.nspname, c.relname)) FROM member m JOIN pg_catalog.pg_class c ON c.oid = m.prrelid
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace ORDER BY c.oid LIMIT 100))::text FROM pub
UNION ALL
SELECT 'table', pg_catalog.json_strip_nulls(pg_catalog.json_build_object('oid', t.oid::bigint, 'root', t.root::bigint,
  'schema', n.nspname, 'name', c.relname, 'kind', c.relkind, 'unlogged', c.relpersistence = 'u',
  'partition', c.relispartition, 'via', t.via::bigint, 'member', t.member, 'automatic', t.automatic,
  'elsewhere', CASE WHEN t.via IS NULL THEN EXISTS (SELECT FROM pg_catalog.pg_publication o
      WHERE o.oid <> COALESCE(pub.oid, 0) AND o.puballtables)
    OR EXISTS (SELECT FROM pg_catalog.pg_publication_rel r WHERE r.prpubid <> COALESCE(pub.oid, 0) AND r.prrelid IN (t.oid, t.root)
      AND {included})
    OR {elsewhere_by_schema} END,
  'filter', CASE WHEN t.via = t.oid THEN {filter} END, 'filter_hash', CASE WHEN t.via = t.oid THEN {filter_hash} END, 'listed', {listed},
  'columns', CASE WHEN t.via IS DISTINCT FROM t.oid AND t.via IS NOT NULL THEN NULL ELSE
    (SELECT pg_catalog.json_agg(pg_catalog.json_build_object('name', a.attname, 'type', pg_catalog.format_type(a.atttypid, NULL),
      'base', CASE WHEN a.atttypid >= 16384 THEN (WITH RECURSIVE d(oid) AS (
          SELECT typbasetype FROM pg_catalog.pg_type WHERE oid = a.atttypid AND typtype = 'd'
          UNION ALL SELECT y.typbasetype FROM d JOIN pg_catalog.pg_type y ON y.oid = d.oid AND y.typtype = 'd')
        SELECT pg_catalog.format_type(d.oid, NULL) FROM d JOIN pg_catalog.pg_type y ON y.oid = d.oid AND y.typtype <> 'd') END,
      'generated', a.attgenerated, 'not_null', a.attnotnull, 'sent', {is_sent} AND COALESCE(a.attnum = ANY ({sent}::int2[]), true),
      'expression', pg_catalog.pg_get_expr(d.adbin, d.adrelid),
      'sequence', (SELECT pg_catalog.format('%I.%I', sn.nspname, s.relname) FROM pg_catalog.pg_class s
        JOIN pg_catalog.pg_namespace sn ON sn.oid = s.relnamespace WHERE s.relkind = 'S' AND s.oid = CASE
        WHEN a.attidentity <> '' THEN (SELECT e.objid FROM pg_catalog.pg_depend e
          WHERE e.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass AND e.refobjid = a.attrelid AND e.refobjsubid = a.attnum
          AND e.classid = e.refclassid AND e.deptype = 'i' LIMIT 1)
        WHEN d.oid IS NOT NULL THEN (SELECT e.refobjid FROM pg_catalog.pg_depend e
          JOIN pg_catalog.pg_class es ON es.oid = e.refobjid AND es.relkind = 'S'
          WHERE e.classid = 'pg_catalog.pg_attrdef'::pg_catalog.regclass AND e.objid = d.oid
          AND e.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass LIMIT 1) END))
      ORDER BY a.attnum)
     FROM pg_catalog.pg_attribute a LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
     WHERE a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attname = ANY ({used})) END,
  'key', CASE WHEN c.relkind = 'p' THEN (SELECT pg_catalog.json_build_object('text', pg_catalog.pg_get_partkeydef(t.oid),
      'columns', COALESCE(k.names, ARRAY[]::text[]), 'moves', q.partstrat = 'l' OR q.partstrat = 'r' AND k.nullable IS NOT FALSE,
      'kept', EXISTS (SELECT FROM pg_catalog.pg_trigger g WHERE g.tgrelid = t.oid AND g.tgname = '{keeps_partition}'
        AND g.tgenabled IN ('O', 'A')))
     FROM pg_catalog.pg_partitioned_table q, LATERAL (SELECT pg_catalog.array_agg(attname::text ORDER BY attnum) AS names,
       pg_catalog.bool_or(NOT attnotnull) AS nullable FROM pg_catalog.pg_attribute
       WHERE attrelid = q.partrelid AND attnum = ANY (q.partattrs::int2[])) k
     WHERE q.partrelid = t.oid) END,
  'reads', CASE WHEN c.relkind IN ('v', 'm') THEN (SELECT pg_catalog.string_agg(DISTINCT pg_catalog.format('%s.%s', vn.nspname, v.relname), ',')
     FROM pg_catalog.pg_rewrite w JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_rewrite'::pg_catalog.regclass
       AND d.objid = w.oid AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.refobjid <> t.oid
     JOIN pg_catalog.pg_class v ON v.oid = d.refobjid JOIN pg_catalog.pg_namespace vn ON vn.oid = v.relnamespace
     WHERE w.ev_class = t.oid) END
))::text
FROM tree t JOIN pg_catalog.pg_class c ON c.oid = t.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN pub ON true LEFT JOIN published p ON p.relid = t.oid
